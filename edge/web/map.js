/** A map of the label space: prototypes and a task on the two directions in which the prototypes differ most. */
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 400;
const HEIGHT = 300;
const MARGIN = 34;
const ROUNDS = 100; // of power iteration; two directions of some dozens of points converge in fewer

const dot = (a, b) => a.reduce((sum, value, place) => sum + value * b[place], 0);

/** The mean and the first two principal components of some vectors, by power iteration on their products. */
export function plane(vectors) {
  const mean = vectors[0].map((_, place) => vectors.reduce((sum, row) => sum + row[place], 0) / vectors.length);
  let rest = vectors.map((row) => Array.from(row, (value, place) => value - mean[place]));
  const axes = [];
  for (let axis = 0; axis < 2; axis++) {
    let direction = mean.map((_, place) => Math.sin(place * 12.9898 + axis)); // any that is the same each time
    for (let round = 0; round < ROUNDS; round++) {
      const shares = rest.map((row) => dot(row, direction));
      const next = mean.map((_, place) => rest.reduce((sum, row, k) => sum + shares[k] * row[place], 0));
      const length = Math.hypot(...next);
      if (!length) break; // one agent, or two alike
      direction = next.map((value) => value / length);
    }
    axes.push(direction);
    rest = rest.map((row) => {
      const along = dot(row, direction);
      return row.map((value, place) => value - along * direction[place]);
    });
  }
  return { mean, axes, at: (row) => axes.map((axis) => dot(row, axis) - dot(mean, axis)) };
}

const element = (name, attributes, text) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

/** Draws a router's agents, once, and then where each task is. */
export class AgentMap {
  constructor(svg) {
    this.svg = svg;
  }

  /** @param {string[]} names Of the agents. @param {number[][][]} prototypes A list of vectors each. */
  show(names, prototypes) {
    const centres = prototypes.map((rows) => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length));
    this.plane = plane(centres);
    const points = centres.map((row) => this.plane.at(row));
    const reach = [0, 1].map((axis) => Math.max(...points.map((point) => Math.abs(point[axis])), 1e-6));
    this.place = (point) => [
      WIDTH / 2 + (Math.max(-1.15, Math.min(1.15, point[0] / reach[0])) * (WIDTH / 2 - MARGIN)) / 1.15,
      HEIGHT / 2 - (Math.max(-1.15, Math.min(1.15, point[1] / reach[1])) * (HEIGHT / 2 - MARGIN)) / 1.15,
    ];
    this.svg.replaceChildren();
    this.groups = names.map((name) => element("g", { "data-agent": name }));
    const taken = [];
    points.map(this.place).forEach(([x, y], i) => {
      // A label goes beside its point: right, left, above or below, wherever it meets the fewest others.
      const wide = names[i].length * 5.4;
      const choices = [[x + 6, y + 3], [x - 6 - wide, y + 3], [x - wide / 2, y - 7], [x - wide / 2, y + 14]];
      const clashes = ([left, base]) =>
        taken.filter((box) => left < box[2] && left + wide > box[0] && base - 9 < box[3] && base > box[1]).length +
        (left < 0 || left + wide > WIDTH ? 5 : 0);
      const [left, base] = choices.reduce((best, choice) => (clashes(choice) < clashes(best) ? choice : best));
      taken.push([left, base - 9, left + wide, base], [x - 4, y - 4, x + 4, y + 4]);
      this.groups[i].append(
        element("title", {}, names[i]),
        element("circle", { cx: x, cy: y, r: 4 }),
        element("text", { x: left, y: base }, names[i]),
      );
    });
    this.line = element("line", { visibility: "hidden" });
    this.task = element("g", { class: "task", visibility: "hidden" });
    this.task.append(element("title", {}, "the task"), element("circle", { r: 6 }));
    this.svg.append(this.line, ...this.groups, this.task);
    this.at = points.map(this.place);
  }

  /** @param {Float32Array|null} vector Of the task. @param {number} top The first agent of the ranking. */
  move(vector, top) {
    const shown = vector ? "visible" : "hidden";
    this.line.setAttribute("visibility", shown);
    this.task.setAttribute("visibility", shown);
    this.groups.forEach((group, place) => group.classList.toggle("top", Boolean(vector) && place === top));
    if (!vector) return;
    const [x, y] = this.place(this.plane.at(vector));
    const circle = this.task.querySelector("circle");
    circle.setAttribute("cx", x);
    circle.setAttribute("cy", y);
    const [x2, y2] = this.at[top];
    for (const [key, value] of Object.entries({ x1: x, y1: y, x2, y2 })) this.line.setAttribute(key, value);
  }
}

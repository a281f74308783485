/** A map of the label space: prototypes and a task in two dimensions, by their distances. */
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 400;
const HEIGHT = 300;
const MARGIN = 34;
const ROUNDS = 300; // of stress majorisation; some dozens of points settle in fewer
const NEAR = 1e-9;
const PULL = 10; // of a cosine; a little less than makes the probabilities of it, so that the others show

const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
const dot = (a, b) => a.reduce((sum, value, place) => sum + value * b[place], 0);
const apart = (a, b) => Math.sqrt(a.reduce((sum, value, place) => sum + (value - b[place]) ** 2, 0));

/**
 * Where points would have to be so that their distances in two dimensions are those of the vectors, as nearly as can
 * be: multidimensional scaling by majorising the stress (SMACOF, de Leeuw 1977), from a circle.
 */
export function layout(vectors) {
  const wanted = vectors.map((a) => vectors.map((b) => apart(a, b)));
  const turn = (2 * Math.PI) / vectors.length;
  let points = vectors.map((_, place) => [Math.cos(turn * place), Math.sin(turn * place)]);
  for (let round = 0; round < ROUNDS; round++) {
    points = points.map((point, i) => {
      const pulls = points.map((other, j) => {
        const stretch = i === j ? 0 : wanted[i][j] / Math.max(distance(point, other), NEAR);
        return [other[0] + stretch * (point[0] - other[0]), other[1] + stretch * (point[1] - other[1])];
      });
      return [0, 1].map((axis) => pulls.reduce((sum, pull, j) => sum + (i === j ? 0 : pull[axis]), 0) / Math.max(points.length - 1, 1));
    });
  }
  return points;
}

/** Where similarities to the agents pull a task: the mean of their places, the most similar counting most. */
export function locate(vector, vectors, points) {
  const weights = vectors.map((other) => Math.exp(PULL * dot(vector, other)));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return [0, 1].map((axis) => points.reduce((sum, point, i) => sum + (weights[i] / total) * point[axis], 0));
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
    this.centres = prototypes.map((rows) => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length));
    this.points = layout(this.centres);
    const reach = [0, 1].map((axis) => Math.max(...this.points.map((point) => Math.abs(point[axis])), NEAR));
    this.place = (point) => [
      WIDTH / 2 + (Math.max(-1.15, Math.min(1.15, point[0] / reach[0])) * (WIDTH / 2 - MARGIN)) / 1.15,
      HEIGHT / 2 - (Math.max(-1.15, Math.min(1.15, point[1] / reach[1])) * (HEIGHT / 2 - MARGIN)) / 1.15,
    ];
    this.svg.replaceChildren();
    this.groups = names.map((name) => element("g", { "data-agent": name }));
    const taken = [];
    this.points.map(this.place).forEach(([x, y], i) => {
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
    this.at = this.points.map(this.place);
  }

  /** @param {Float32Array|null} vector Of the task. @param {number} top The first agent of the ranking. */
  move(vector, top) {
    const shown = vector ? "visible" : "hidden";
    this.line.setAttribute("visibility", shown);
    this.task.setAttribute("visibility", shown);
    this.groups.forEach((group, place) => group.classList.toggle("top", Boolean(vector) && place === top));
    if (!vector) return;
    const [x, y] = this.place(locate(vector, this.centres, this.points));
    const circle = this.task.querySelector("circle");
    circle.setAttribute("cx", x);
    circle.setAttribute("cy", y);
    const [x2, y2] = this.at[top];
    for (const [key, value] of Object.entries({ x1: x, y1: y, x2, y2 })) this.line.setAttribute(key, value);
  }
}

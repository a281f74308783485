/** The editor of agents of one's own; what it holds is kept in this browser. */
const KEPT = "ruvltra-agents";
const FIRST = [
  {
    name: "dba",
    description: "Postgres schema, indexes, slow queries, vacuum, replication.",
    keywords: ["postgres"],
    examples: ["add an index on orders.created_at"],
  },
  { name: "mobile", description: "iOS and Android apps, Swift, Kotlin, app store releases.", keywords: [], examples: [] },
  { name: "frontend", description: "React components, CSS, layout, accessibility of pages.", keywords: [], examples: [] },
];
const lines = (text, separator) => text.split(separator).map((part) => part.trim()).filter(Boolean);
const editable = (agent) =>
  typeof agent?.name === "string" && ["keywords", "examples"].every((field) => Array.isArray(agent[field] ?? []));

export class AgentEditor {
  /** @param {HTMLElement} root @param {() => void} changed Called when an agent has been changed. */
  constructor(root, changed) {
    this.root = root;
    this.changed = changed;
    this.agents = this._kept() ?? structuredClone(FIRST);
    this._draw();
  }

  add() {
    this.agents.push({ name: "", description: "", keywords: [], examples: [] });
    this._draw();
    this.root.lastElementChild.querySelector("input").focus();
  }

  reset() {
    this.agents = structuredClone(FIRST);
    this._draw();
    this._keep();
  }

  _kept() {
    try {
      const kept = JSON.parse(localStorage.getItem(KEPT));
      return Array.isArray(kept) && kept.length && kept.every(editable) ? kept : null;
    } catch {
      return null; // storage that is switched off, or somebody else's
    }
  }

  _keep() {
    try {
      localStorage.setItem(KEPT, JSON.stringify(this.agents));
    } catch {
      // Storage may be switched off: the agents last as long as the page.
    }
    this.changed();
  }

  _draw() {
    this.root.replaceChildren(
      ...this.agents.map((agent, place) => {
        const form = document.createElement("div");
        form.className = "own";
        form.append(
          this._field("Name", "input", agent.name, (text) => (agent.name = text.trim())),
          this._field("Description: what it delivers", "textarea", agent.description, (text) => (agent.description = text)),
          this._field("Keywords, separated by commas", "input", (agent.keywords ?? []).join(", "), (text) => {
            agent.keywords = lines(text, ",");
          }),
          this._field("Examples, one a line", "textarea", (agent.examples ?? []).join("\n"), (text) => {
            agent.examples = lines(text, "\n");
          }),
        );
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = `Remove ${agent.name || "this agent"}`;
        remove.addEventListener("click", () => {
          this.agents.splice(place, 1);
          this._draw();
          this._keep();
        });
        form.append(remove);
        return form;
      }),
    );
  }

  _field(name, kind, value, set) {
    const label = document.createElement("label");
    const field = document.createElement(kind);
    if (kind === "input") field.type = "text";
    else field.rows = 2;
    field.value = value ?? "";
    field.addEventListener("input", () => {
      set(field.value);
      this._keep();
    });
    label.append(name, field);
    return label;
  }
}

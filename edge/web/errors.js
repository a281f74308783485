/** What every error of this module is; the message says what is wrong, then what to do. */
export class EdgeError extends Error {
  constructor(message) {
    super(message);
    this.name = "EdgeError";
  }
}

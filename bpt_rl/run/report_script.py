"""The page's one script: it lets readers sort tables. A page without it is complete."""

import base64
import hashlib

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const bodies = [...table.tBodies];
  const units = bodies.length > 1 ? bodies : [...bodies[0].rows];
  if (units.length < 2) continue;
  const rowOf = (unit, column) => unit.cells ? unit
    : column ? [...unit.rows].find((row) => row.cells.length > 1) : unit.rows[0];
  const valueOf = (unit, column) => {
    const cell = rowOf(unit, column)?.cells[column];
    const number = cell?.querySelector("[data-value]");
    if (number) return Number(number.dataset.value);
    const text = cell?.textContent.trim() ?? "";
    if (text === "" || text === "\\u2013") return null;
    const plain = Number(text.replaceAll(",", ""));
    return Number.isNaN(plain) ? text : plain;
  };
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const values = new Map(units.map((unit) => [unit, valueOf(unit, column)]));
      const isText = units.some((unit) => typeof values.get(unit) === "string");
      const was = head.getAttribute("aria-sort");
      const rises = was ? was === "descending" : isText;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rises ? "ascending" : "descending");
      const compare = (a, b) => isText ? String(a).localeCompare(String(b), "en", {numeric: true}) : a - b;
      const ordered = [...units].sort((one, other) => {
        const [a, b] = [values.get(one), values.get(other)];
        if (a === null || b === null) return (a === null) - (b === null);
        return rises ? compare(a, b) : compare(b, a);
      });
      for (const unit of ordered) unit.parentNode.append(unit);
    });
  });
}
"""
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; img-src data:; media-src data:"
"""Content security policy: a browser refuses to load anything, or to run another script."""

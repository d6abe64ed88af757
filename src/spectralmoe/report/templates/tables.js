// Tables that sort by a click on a heading, and filter.
function sortable(table) {
  const heads = [...table.querySelectorAll("th[data-sort]")], body = table.tBodies[0];
  const value = (row, column, numbers) => {
    const held = row.cells[column].dataset.value;
    return numbers ? (held === undefined || held === "" ? null : Number(held)) : held ?? row.cells[column].textContent;
  };
  heads.forEach((head) => head.querySelector("button").addEventListener("click", () => {
    const way = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending", numbers = head.dataset.sort === "number";
    heads.forEach((other) => other.setAttribute("aria-sort", other === head ? way : "none"));
    const column = Number(head.dataset.column), sign = way === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [value(a, column, numbers), value(b, column, numbers)];
      if (x === null || y === null) return (x === null) - (y === null); // no data stays at the end
      return sign * (numbers ? x - y : x.localeCompare(y, "en", { numeric: true }));
    };
    body.append(...[...body.rows].sort(compare));
  }));
}

function layerTable(host) {
  const table = host.querySelector("table"), rows = [...table.tBodies[0].rows], id = fresh("filter");
  const count = el("output", { for: id, "aria-live": "polite" });
  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.cells[0].textContent.toLowerCase().includes(word));
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} layers`;
  };
  const box = el("input", { id, type: "search", placeholder: "name or number", oninput: filter });
  const groups = [...table.tHead.rows[0].querySelectorAll("[data-group]")].map((head) => head.dataset.group);
  const columns = choice("Columns", [["all", "all"], ...groups.map((name) => [name, name])], (chosen) => {
    for (const cell of table.querySelectorAll("[data-group]")) cell.classList.toggle("away", chosen !== "all" && cell.dataset.group !== chosen);
  });
  host.prepend(controls("Layer table", el("span", { class: "control" }, el("label", { for: id }, "Filter layers"), box, count), columns.node));
  filter();
}

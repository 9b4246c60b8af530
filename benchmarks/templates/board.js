// A click on a column's name sorts its table: numbers from the greatest, names by the alphabet, the other way next time.
// What has no value stands last.
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const rows = [...table.tBodies[0].rows];
    const value = (row) => row.cells[place].dataset.s;
    const filled = rows.filter((row) => value(row) !== "");
    const numbers = filled.every((row) => !Number.isNaN(Number(value(row))));
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numbers;
    const sign = down ? -1 : 1;
    filled.sort((a, b) => sign * (numbers ? value(a) - value(b) : value(a).localeCompare(value(b))));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...filled, ...rows.filter((row) => value(row) === ""));
  }));
}

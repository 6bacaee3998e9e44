"use strict";
// A button under every table: what it shows now, as CSV.
const quoted = (text) => `"${text.trim().replaceAll('"', '""')}"`;
const csv = (table) => {
  const grid = [...table.rows].map(() => []);
  [...table.rows].forEach((row, r) => {
    let column = 0;
    for (const one of row.cells) {
      while (grid[r][column] !== undefined) column++;
      // A cell over several rows or columns says the same in each.
      for (let i = 0; i < one.rowSpan; i++)
        for (let j = 0; j < one.colSpan; j++) grid[r + i][column + j] = quoted(one.innerText);
      column += one.colSpan;
    }
  });
  const shown = grid.filter((_, r) => !table.rows[r].hidden);
  return shown.map((cells) => cells.join(",")).join("\r\n") + "\r\n";
};
document.querySelectorAll("main table, section table").forEach((table, place) => {
  const button = document.createElement("button");
  button.textContent = "CSV";
  button.className = "csv";
  button.title = "this table, as it is shown, as a file";
  button.onclick = () => {
    const link = document.createElement("a");
    // The mark says UTF-8 to spreadsheets.
    link.href = URL.createObjectURL(new Blob(["\ufeff", csv(table)], { type: "text/csv" }));
    const name = table.closest("section.page")?.id || document.body.dataset.name;
    link.download = `${table.dataset.name || `${name}_${place + 1}`}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  (table.closest(".scroll") || table).after(button);
});
// Rows by their fields.
document.querySelectorAll(".filters").forEach((filters) => {
  const selects = [...filters.querySelectorAll("select")];
  const rows = [...document.querySelectorAll(`#${filters.dataset.of} tbody tr`)];
  // "!value": all but that.
  const fits = (value, wanted) =>
    wanted.startsWith("!") ? value !== wanted.slice(1) : !wanted || value === wanted;
  const apply = () => {
    for (const row of rows)
      row.hidden = !selects.every((one) => fits(row.dataset[one.dataset.field], one.value));
    const shown = rows.filter((row) => !row.hidden).length;
    filters.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  filters.addEventListener("change", apply);
  apply();
});
// On paper what is folded cannot be opened, and code is in the notebooks.
addEventListener("beforeprint", () =>
  document.querySelectorAll("details:not(.code)").forEach((one) => (one.open = true))
);

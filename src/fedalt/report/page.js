// Draws the figures, sorts tables, and opens what is folded before the page is printed.
const { specs, datasets } = JSON.parse(document.getElementById("figures").textContent);

function rowsOf(columns) {
  const keys = Object.keys(columns);
  return columns[keys[0]].map((_, at) => Object.fromEntries(keys.map((key) => [key, columns[key][at]])));
}

const options = {
  actions: false,
  renderer: "svg",
  ast: true, // expressions are interpreted: the page's policy forbids making code of text
  defaultStyle: false,
  tooltip: { disableDefaultStyle: true },
};
for (const place of document.querySelectorAll("[data-figure]")) {
  const spec = specs[place.dataset.figure];
  const rows = rowsOf(datasets[spec.data.name]);
  await window.vegaEmbed(place, { ...spec, data: { values: rows } }, options);
}
document.documentElement.dataset.drawn = "yes";

function compare(a, b, down) {
  if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
  const numbers = !Number.isNaN(Number(a)) && !Number.isNaN(Number(b));
  const order = numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
  return down ? -order : order;
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const down = head.ariaSort === "ascending" || (!head.ariaSort && head.classList.contains("number"));
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.ariaSort = down ? "descending" : "ascending";
    const body = head.closest("table").tBodies[0];
    const value = (row) => row.cells[head.cellIndex].dataset.value;
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), down)));
  });
}

window.addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});

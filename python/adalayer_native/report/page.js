"use strict";
// Sorting, filtering, and where a box scrolls sideways; without scripts tables are complete and in
// the network's order.
(() => {
  const sortable = (table) => {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const heads = Array.from(table.tHead.rows[0].cells);
    const value = (row, column) => {
      const text = row.cells[column].dataset.value;
      return heads[column].dataset.type === "number" ? (text === "" ? NaN : Number(text)) : text;
    };
    const compare = (column, sign) => (left, right) => {
      const a = value(left, column), b = value(right, column);
      if (typeof a === "number") {
        // What is not known comes last in both directions.
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return sign * (a - b) || left.dataset.place - right.dataset.place;
      }
      return sign * a.localeCompare(b, "en", { numeric: true }) || left.dataset.place - right.dataset.place;
    };
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        rows.sort(compare(column, up ? 1 : -1));
        body.append(...rows);
      });
    });
  };
  document.querySelectorAll("table.sortable").forEach(sortable);

  const boxes = Array.from(document.querySelectorAll(".wide"));
  const hints = () => {
    for (const box of boxes)
      box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth;
  };
  window.addEventListener("resize", hints);
  hints();

  const rows = Array.from(document.querySelectorAll("#layers tbody tr"));
  const text = document.getElementById("filter");
  const bits = document.getElementById("bits");
  const count = document.getElementById("count");
  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const all = row.dataset.search.toLowerCase();
      const fits = words.every((word) => all.includes(word))
        && (bits.value === "" || row.dataset.bits === bits.value);
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    count.textContent = `${shown} of ${rows.length} layers`;
  };
  text.addEventListener("input", filter);
  bits.addEventListener("change", filter);
  filter();
})();

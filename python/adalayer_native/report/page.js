"use strict";
// Sorting, filtering, tabs, and where a box scrolls sideways; without scripts tables are complete and
// in the network's order, and all parts are shown.
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

  const list = document.querySelector("[role=tablist]");
  if (list) {
    const tabs = Array.from(list.querySelectorAll("[role=tab]"));
    const panels = tabs.map((tab) => document.getElementById(tab.getAttribute("aria-controls")));
    const show = (chosen) => {
      tabs.forEach((tab, place) => {
        tab.setAttribute("aria-selected", String(place === chosen));
        tab.tabIndex = place === chosen ? 0 : -1;
        panels[place].hidden = place !== chosen;
      });
      hints();
    };
    tabs.forEach((tab, place) => {
      panels[place].setAttribute("role", "tabpanel");
      panels[place].setAttribute("aria-labelledby", tab.id);
      tab.addEventListener("click", () => show(place));
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step === undefined) return;
      const now = tabs.findIndex((tab) => tab.tabIndex === 0);
      const next = (now + step + tabs.length) % tabs.length;
      show(next);
      tabs[next].focus();
    });
    list.hidden = false;
    show(location.hash === "#microscope" ? 1 : 0);
  }

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

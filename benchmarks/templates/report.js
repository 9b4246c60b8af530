"use strict";
// Values at the pointer and at the keyboard: one tab stop a chart or heat map, the arrow keys move inside it.
const tip = document.getElementById("tip");
const show = (mark) => {
  const box = mark.getBoundingClientRect();
  tip.textContent = mark.dataset.v;
  tip.hidden = false;
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 4);
  const above = box.top - own.height - 8;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
};
const hide = () => { tip.hidden = true; };
for (const chart of document.querySelectorAll("svg.chart, table.heat")) {
  const marks = [...chart.querySelectorAll("[data-v]")];
  const width = chart.matches("table") ? chart.tHead.rows[0].cells.length - 1 : 1;
  marks.forEach((mark, place) => {
    mark.tabIndex = place ? -1 : 0;
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => show(mark));
    mark.addEventListener("blur", hide);
    mark.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      const next = marks[place + moves[event.key]];
      if (!next) return;
      mark.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });
}
const follow = () => {
  const here = document.activeElement;
  if (here && here.dataset.v && !tip.hidden) show(here); // focus scrolls to a value: its tip goes along
  else hide();
};
addEventListener("scroll", follow, { passive: true });
// On paper nothing can be opened: tables behind charts are printed, long listings stay closed.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not(.quiet):not([open])")];
  opened.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));

// Everything is drawn where the page asks for it; printing opens what is closed and takes the light theme.
const CHARTS = {
  steps: stepCharts, epochs: epochCharts, history: historyMaps, similarity: similarityMap, spectra: spectraChart, paths: pathBands,
  association: associationMap, text: runningText, examples: exampleList, estimates: estimateCharts, layers: layerTable,
};

themeSwitch(document.querySelector("[data-theme-switch]"));
for (const section of document.querySelectorAll("[data-panel=load]")) loadPanel(section);
for (const [name, draw] of Object.entries(CHARTS)) document.querySelectorAll(`[data-chart=${name}]`).forEach(draw);
document.querySelectorAll("table.sortable").forEach(sortable);

let opened = [];
addEventListener("beforeprint", () => {
  printing = true;
  opened = [...document.querySelectorAll("details:not([open]):not(.values)")];
  opened.forEach((one) => (one.open = true));
  redraw();
});
addEventListener("afterprint", () => {
  printing = false;
  opened.forEach((one) => (one.open = false));
  redraw();
});

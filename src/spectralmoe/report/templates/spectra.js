// Singular values of the routing matrices, a line a layer, from light (first) to dark (last).
function spectraChart(host) {
  const run = DATA.inspections[host.dataset.run], layers = run.layers.filter((layer) => layer.spectrum.length);
  const colour = (i) => css(mix(["#8fbbe8", "#2f78c4", "#8a4f9e", "#c0392b"], layers.length > 1 ? i / (layers.length - 1) : 0.3));
  const series = layers.map((layer, i) => {
    const ranks = Object.entries(layer.ranks).map(([name, value]) => `${name.replace("_", " ")} ${figure(value)}`);
    return { label: `layer ${layer.label}`, x: layer.spectrum.map((_, k) => k + 1), y: layer.spectrum, colour: colour(i), dash: "",
      note: ranks.length ? ` (${ranks.join(", ")})` : "" };
  });
  host.append(legend((t) => mix(["#8fbbe8", "#2f78c4", "#8a4f9e", "#c0392b"], t), [[0, `layer ${layers[0].label}`], [1, `layer ${layers[layers.length - 1].label}`]], []));
  lineChart(host, { title: `Singular values of the routing matrix, ${run.title}`, series, xTitle: "place", caption: "", log: true, height: 270, alone: true });
  const most = Math.max(...layers.map((layer) => layer.spectrum.length));
  host.append(valuesTable(`${run.title}: singular values`, () => ["layer", "stable rank", "effective rank", ...[...Array(most).keys()].map((k) => String(k + 1))],
    () => layers.map((layer) => [layer.label, figure(layer.ranks.stable_rank), figure(layer.ranks.effective_rank),
      ...[...Array(most).keys()].map((k) => (k < layer.spectrum.length ? figure(layer.spectrum[k]) : "–"))])).node);
}

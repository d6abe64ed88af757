// How alike the experts of a layer are: one matrix large, all layers small, the pairs that are most alike.
const MATRIX = {
  output: ["squared cosine of outputs for the same tokens", "outputs"],
  weights: ["cosine of weights", "weights"],
  rows: ["cosine of router rows", "router rows"],
};

function similarityMap(host) {
  const run = DATA.inspections[host.dataset.run], layers = run.layers.filter((layer) => Object.keys(layer.similarity).length);
  const kinds = Object.keys(MATRIX).filter((kind) => layers.some((layer) => layer.similarity[kind]));
  const state = { kind: kinds[0], layer: 0 }, blank = { get: () => NaN, low: 0, high: 1, pairs: [] };
  const matrix = (i, kind = state.kind) => {
    const layer = layers[i], held = layer.similarity[kind];
    if (!held) return blank;
    if (!held.get) {
      const e = layer.experts, values = unpack(held.values, held.symmetric ? (e * (e + 1)) / 2 : e * e, run.bits, held.low, held.high);
      const start = (r) => r * e - (r * (r - 1)) / 2 - r; // of row r in the upper triangle
      held.get = held.symmetric ? (a, b) => values[start(Math.min(a, b)) + Math.max(a, b)] : (a, b) => values[a * e + b];
    }
    return held;
  };
  const strength = (value) => sequential(Math.abs(value)), scale = el("div", {});
  const which = choice("Compare", kinds.map((kind) => [kind, MATRIX[kind][1]]), (kind) => {
    state.kind = kind;
    update();
  });
  const layer = choice("Layer", layers.map((one, i) => [i, one.label]), (i) => pick(Number(i)));
  const large = el("div", {}), pairs = el("div", { class: "scroll" });
  const small = gallery("All layers", layers.map((one, i) => ({
    text: one.label,
    draw: (canvas) => thumbnail(canvas, one.experts, one.experts, (a, b) => (Number.isNaN(matrix(i).get(a, b)) ? [128, 128, 128] : strength(matrix(i).get(a, b)))),
  })), pick, true);
  scale.append(legend(sequential, [[0, "0"], [0.5, "0.5"], [1, "1 or −1"]], SIGNS.slice(1)));
  host.append(controls("Similarity", which.node, layer.node), scale, el("div", { class: "split" }, large, pairs), el("h4", {}, "All layers"), small.node);
  const experts = () => [...Array(layers[state.layer].experts).keys()];
  const exact = run.bits < 8 ? ` (to ${figure(0.5 / (2 ** run.bits - 2))}; the table has exact values)` : "";
  large.style.maxWidth = `${Math.min(40 * Math.max(...layers.map((one) => one.experts)), 560) + 60}px`;
  const draw = heatMap(large, {
    label: `Similarity of the experts of ${run.title}`,
    rows: experts, columns: experts, rowTitle: () => "expert", columnTitle: () => "expert",
    cell: (a, b) => matrix(state.layer).get(a, b), paint: strength, widest: 40, square: true,
    tell: (a, b) => `layer ${layers[state.layer].label}, experts ${a} and ${b}: ${figure(matrix(state.layer).get(a, b))}${exact}`,
  });
  const table = valuesTable(`${run.title}: similarity`, () => ["expert", ...experts().map(String)],
    () => experts().map((a) => [String(a), ...experts().map((b) => figure(matrix(state.layer).get(a, b)))]));
  large.append(table.node);

  function pick(i) {
    state.layer = i;
    layer.select.value = i;
    update();
  }

  function update() {
    const held = matrix(state.layer), rows = held.pairs.map(([a, b, value]) => el("tr", {}, el("td", {}, `${a} and ${b}`), el("td", {}, figure(value))));
    const caption = `Layer ${layers[state.layer].label}, most alike: ${MATRIX[state.kind][0]}`;
    pairs.replaceChildren(el("table", {}, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "experts"), el("th", { scope: "col" }, "value"))),
      el("tbody", {}, ...(rows.length ? rows : [el("tr", {}, el("td", { colspan: 2 }, "no data"))]))));
    small.show(state.layer);
    redraw();
    table.refresh();
  }
  update();
}

// Load: layer x expert, all runs under one set of controls and one scale of colour.
const DEAD = 0.1; // of an even share
const SIGNS = [["crossed", "less than a tenth of an even share (dead)"], ["hatched", "no data"]];
const EVEN = [[0, "⅛"], [1 / 3, "½"], [0.5, "1"], [2 / 3, "2"], [1, "8 × even"]];

const METRICS = {
  share: ["load, × even", (layer, e) => (layer.counts[e] / layer.slots) * layer.experts],
  count: ["slots", (layer, e) => layer.counts[e]],
  weight: ["combine weight, × even", (layer, e) => (layer.weights?.[e] ?? NaN) * layer.experts],
};

function loadPanel(section) {
  const state = { metric: "share", sorted: false }, updates = [];
  const update = () => updates.forEach((one) => one());
  const runs = DATA.inspections.filter((run) => run.layers.some((layer) => layer.counts));
  for (const layer of runs.flatMap((run) => run.layers)) layer.slots = layer.counts ? layer.counts.reduce((a, b) => a + b, 0) : 0;
  const most = Math.max(...runs.flatMap((run) => run.layers.flatMap((layer) => layer.counts || [])), 1);
  const names = Object.keys(METRICS).filter((name) => name !== "weight" || runs.some((run) => run.layers.some((layer) => layer.weights)));
  const metric = choice("Show", names.map((name) => [name, METRICS[name][0]]), (value) => {
    state.metric = value;
    update();
  });
  const sort = check("sort the experts of each layer by load", (on) => {
    state.sorted = on;
    update();
  });
  const scale = el("div", {});
  const scaled = () => scale.replaceChildren(state.metric === "count"
    ? legend(sequential, [[0, "0"], [1, `${figure(most)} slots`]], SIGNS.slice(1))
    : legend((t) => diverging(2 * t - 1), EVEN, SIGNS));
  updates.push(scaled);
  scaled();
  section.querySelector("[data-controls]").append(controls("Load heat map", metric.node, sort), scale);
  for (const host of section.querySelectorAll("[data-chart=load]")) updates.push(loadMap(host, DATA.inspections[host.dataset.run], state, most));
}

function loadMap(host, run, state, most) {
  const experts = Math.max(...run.layers.map((layer) => layer.experts));
  const orders = run.layers.map((layer) => {
    const plain = [...Array(layer.experts).keys()];
    return { plain, sorted: layer.counts ? [...plain].sort((a, b) => layer.counts[b] - layer.counts[a]) : plain };
  });
  const expert = (r, c) => orders[r][state.sorted ? "sorted" : "plain"][c];
  const cell = (r, c) => {
    const layer = run.layers[r];
    if (c >= layer.experts) return undefined;
    return layer.counts ? METRICS[state.metric][1](layer, expert(r, c)) : NaN;
  };
  const tell = (r, c) => {
    const layer = run.layers[r], e = expert(r, c);
    if (e === undefined) return `layer ${layer.label} has ${layer.experts} experts`;
    if (!layer.counts) return `layer ${layer.label}: no data`;
    const weight = layer.weights ? `, ${figure(METRICS.weight[1](layer, e))} × even of the combine weight` : "";
    return `layer ${layer.label}, expert ${e}: ${figure(METRICS.share[1](layer, e))} × even (${whole(layer.counts[e])} of ${whole(layer.slots)} slots)${weight}${layer.thin ? `; too little data to judge (${layer.thin})` : ""}`;
  };
  const ranks = [...Array(experts).keys()], thin = run.layers.filter((layer) => layer.counts && layer.thin).map((layer) => layer.label);
  if (thin.length) host.append(el("p", { class: "hint" }, `Too few slots to call an expert dead: layer ${thin.join(", ")}.`));
  const draw = heatMap(host, {
    label: `Load of ${run.title}, layers by experts`,
    rows: () => run.layers.map((layer) => layer.label),
    columns: () => (state.sorted ? ranks.map((i) => i + 1) : ranks),
    rowTitle: () => "layer",
    columnTitle: () => (state.sorted ? "experts from the most to the least used" : "expert"),
    cell, tell,
    paint: (value) => (state.metric === "count" ? sequential(value / most) : evenly(value)),
    mark: (value, r) => state.metric !== "count" && value < DEAD && !run.layers[r].thin,
  });
  const table = valuesTable(`${run.title}: ${METRICS.share[0]}`,
    () => ["layer", ...ranks.map((i) => (state.sorted ? `place ${i + 1}` : `expert ${i}`))],
    () => run.layers.map((layer, r) => [layer.label, ...ranks.map((c) => tableText(cell(r, c), state.sorted ? `expert ${expert(r, c)}: ` : ""))]));
  host.append(table.node);
  return () => {
    draw();
    table.refresh();
    const caption = table.node.querySelector("caption");
    if (caption) caption.textContent = `${run.title}: ${METRICS[state.metric][0]}`;
  };
}

const tableText = (value, before) => (value === undefined ? "–" : before + figure(value));

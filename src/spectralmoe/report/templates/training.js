// Through training: the keys of the epochs and steps as lines, the load of each layer as maps.
const KEYS = {
  max_vio: "MaxVio, mean over layers", max_vio_worst: "MaxVio, worst layer", entropy: "entropy of tokens",
  dead_experts: "dead experts", dropped: "share of slots dropped", near_tie: "share of tokens near a tie",
  validation_accuracy: "validation accuracy, %",
};

const stepCharts = (host) => curves(host, DATA.monitors, "step");
const epochCharts = (host) => curves(host, DATA.histories, "epoch");

function curves(host, runs, at) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.keys)))];
  const series = (name) => runs.map((run, i) => ({
    label: run.title, x: run.steps, y: run.keys[name] || run.steps.map(() => null), colour: SERIES[i % SERIES.length], dash: DASHES[i % DASHES.length],
  }));
  if (runs.length > 1) host.append(key(series(names[0])));
  const grid = el("div", { class: "charts" });
  host.append(grid);
  for (const name of names) {
    const cell = el("div", {});
    grid.append(cell);
    lineChart(cell, { title: KEYS[name] || name.replaceAll("_", " "), series: series(name), xTitle: at, hint: " " });
  }
  const rows = () => runs.flatMap((run) => run.steps.map((step, i) => [
    (runs.length > 1 ? `${run.title}, ` : "") + `${at} ${step}`, ...names.map((name) => figure(run.keys[name] ? run.keys[name][i] : null))]));
  host.append(valuesTable(`Values by ${at}`, () => [at, ...names.map((name) => KEYS[name] || name)], rows).node);
}

function historyMaps(host) {
  const { load, title } = DATA.monitors[host.dataset.run], count = load.steps.length;
  for (const layer of load.layers) {
    layer.root = unpack(layer.values, count * layer.experts, 8, 0, layer.high);
    layer.at = (step, e) => layer.root[step * layer.experts + e] ** 2;
  }
  if (load.all > count) host.append(el("p", { class: "hint" }, `${count} of ${load.all} recorded steps are shown, evenly spread.`));
  host.append(legend((t) => diverging(2 * t - 1), EVEN, SIGNS));
  atStep(host, load, title);
  overTime(host, load, title);
}

// Layer x expert at the step of a slider.
function atStep(host, load, title) {
  let step = load.steps.length - 1;
  const heading = el("h4", {}), name = () => (heading.textContent = `All layers at step ${load.steps[step]}`);
  const id = fresh("step"), shown = el("output", { for: id }, `step ${load.steps[step]}`);
  const slider = el("input", { id, type: "range", min: 0, max: step, value: step, oninput: () => {
    step = Number(slider.value);
    shown.textContent = `step ${load.steps[step]}`;
    slider.setAttribute("aria-valuetext", shown.textContent);
    name();
    draw();
    table.refresh();
  } });
  name();
  const experts = Math.max(...load.layers.map((layer) => layer.experts)), columns = [...Array(experts).keys()];
  const cell = (r, c) => (c < load.layers[r].experts ? load.layers[r].at(step, c) : undefined);
  host.append(heading, controls("Step", el("span", { class: "control wide" }, el("label", { for: id }, "Step"), slider, shown)));
  const draw = heatMap(host, {
    label: `Load of ${title} at one step, layers by experts`,
    rows: () => load.layers.map((layer) => layer.label), columns: () => columns, rowTitle: () => "layer", columnTitle: () => "expert",
    cell, paint: evenly, mark: (value) => value < DEAD,
    tell: (r, c) => `step ${load.steps[step]}, layer ${load.layers[r].label}, expert ${c}: ${figure(cell(r, c))} × even`,
  });
  const table = valuesTable(`${title}: load at the chosen step, × even`, () => ["layer", ...columns.map((e) => `expert ${e}`)],
    () => load.layers.map((layer, r) => [layer.label, ...columns.map((e) => tableText(cell(r, e), ""))]));
  host.append(table.node);
}

// One layer over all steps, chosen from small pictures of all.
function overTime(host, load, title) {
  let layer = load.layers[0];
  const large = el("div", {}), heading = el("h4", {});
  const small = gallery("Layers, steps across and experts down", load.layers.map((one) => ({
    text: one.label,
    draw: (canvas) => thumbnail(canvas, one.experts, load.steps.length, (e, step) => (Number.isNaN(one.at(step, e)) ? [128, 128, 128] : evenly(one.at(step, e)))),
  })), pick);
  host.append(heading, small.node, large);
  const draw = heatMap(large, {
    label: `Load of one layer of ${title}, experts by steps`,
    rows: () => [...Array(layer.experts).keys()], columns: () => load.steps, rowTitle: () => "expert", columnTitle: () => "step",
    cell: (e, step) => layer.at(step, e), paint: evenly, mark: (value) => value < DEAD, highest: 16, lowest: 3,
    tell: (e, step) => `layer ${layer.label}, expert ${e}, step ${load.steps[step]}: ${figure(layer.at(step, e))} × even`,
  });
  const table = valuesTable(`${title}: one layer through training, × even`, () => ["expert", ...load.steps.map((step) => `step ${step}`)],
    () => [...Array(layer.experts).keys()].map((e) => [String(e), ...load.steps.map((_, step) => figure(layer.at(step, e)))]));
  large.append(table.node);
  function pick(i) {
    layer = load.layers[i];
    heading.textContent = `Layer ${layer.label} through training`;
    small.show(i);
    if (draw) draw();
    table.refresh();
  }
  pick(0);
}

// A comparison as small charts: the mean, its 95% interval, and the single seeds, a row each.
function estimateCharts(host) {
  const { rows, columns, meanings } = DATA.comparisons[host.dataset.run], grid = el("div", { class: "charts" });
  host.append(el("p", { class: "hint" }, "Bar: mean. Line: 95% interval, cut where it leaves the chart. Dots: seeds."), grid);
  for (const [name, estimates] of Object.entries(columns)) {
    const known = estimates.filter(Boolean).flatMap(([mean, , values]) => [mean, ...values]);
    const box = el("div", { class: "lines", role: "img", "aria-label": `${name}: the same numbers as in the table above` });
    grid.append(el("figure", {}, el("figcaption", { title: meanings[name] || "" }, name.replaceAll("_", " ")), known.length ? box : el("p", { class: "none" }, "no data")));
    if (known.length) whenSized(box, () => estimatePicture(box, rows, estimates, Math.min(...known), Math.max(...known)));
  }
}

function estimatePicture(box, rows, estimates, least, most) {
  const width = box.clientWidth, left = 128, right = 52, line = 19, height = rows.length * line + 20;
  const margin = 0.12 * (most - least || Math.abs(most) || 1), low = least - margin, high = most + margin;
  const x = (value) => left + Math.min(Math.max((value - low) / (high - low), 0), 1) * (width - left - right);
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
  for (const end of [least, most]) {
    picture.append(shape("line", { class: "grid", x1: x(end), x2: x(end), y1: 0, y2: rows.length * line }));
    if (end === least || most > least) picture.append(shape("text", { x: x(end), y: height - 5, "text-anchor": "middle" }, figure(end)));
  }
  rows.forEach((name, r) => {
    const y = r * line + line / 2, short = name.length > 20 ? name.slice(0, 19) + "…" : name, found = estimates[r];
    picture.append(shape("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, shape("title", {}, name), short));
    picture.append(shape("text", { x: width - right + 6, y: y + 4, class: "strong" }, found ? figure(found[0]) : "no data"));
    if (!found) return;
    const [mean, half, values] = found;
    if (half) picture.append(shape("line", { class: "interval", x1: x(mean - half), x2: x(mean + half), y1: y, y2: y }));
    for (const value of values) picture.append(shape("circle", { class: "seed", cx: x(value), cy: y, r: 2.2 }));
    picture.append(shape("rect", { class: "mean", x: x(mean) - 1.5, y: y - 6, width: 3, height: 12 }));
  });
  box.replaceChildren(picture);
}

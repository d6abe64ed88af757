// Line charts. series: {label, x, y, colour, dash, note}; null is a gap. alone: read one line, not all at one place.
function lineChart(host, { title, caption = title, series, xTitle, log = false, height = 190, alone = false, hint }) {
  const box = el("div", { class: "lines", tabindex: 0, role: "application", "aria-roledescription": "line chart",
    "aria-label": `${title}. Arrow keys read the values.` });
  const said = readout(hint || "Point at the chart, or focus it and use the arrow keys.");
  host.append(el("figure", {}, el("figcaption", {}, caption), box, said.node));
  const xs = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const known = series.flatMap((one) => one.y.filter((y) => y !== null && (!log || y > 0)));
  if (!known.length) {
    box.replaceWith(el("p", { class: "none" }, "no data"));
    said.node.remove();
    return;
  }
  const scaled = log ? Math.log10 : (y) => y, low = Math.min(...known.map(scaled)), high = Math.max(...known.map(scaled));
  const marks = ticks(low, high, log), bottom = Math.min(low, marks[0]), top = Math.max(high, log ? high : marks[marks.length - 1]);
  let at = [0, 0], px, py, paths = [], dot;

  function draw() {
    const width = box.clientWidth, left = 46, right = 10, foot = 32, head = 8;
    if (!width) return;
    px = (x) => left + ((x - xs[0]) / (xs[xs.length - 1] - xs[0] || 1)) * (width - left - right);
    py = (y) => height - foot - ((scaled(y) - bottom) / (top - bottom || 1)) * (height - foot - head);
    const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    for (const mark of marks) {
      const y = height - foot - ((mark - bottom) / (top - bottom || 1)) * (height - foot - head);
      picture.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }),
        shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, figure(log ? 10 ** mark : mark)));
    }
    const last = xs[xs.length - 1], between = ticks(xs[0], last, false).filter((x) => x > xs[0] && x < last && Number.isInteger(x));
    const clear = between.filter((x) => px(x) - px(xs[0]) > 40 && px(last) - px(x) > 40);
    for (const x of xs.length > 1 ? [xs[0], ...clear, last] : xs) {
      picture.append(shape("text", { x: px(x), y: height - foot + 15, "text-anchor": x === last && xs.length > 1 ? "end" : "middle" }, figure(x)));
    }
    picture.append(shape("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, xTitle));
    paths = series.map((one) => shape("path", { d: track(one), stroke: one.colour, "stroke-dasharray": one.dash || "", class: "series" }));
    dot = shape("circle", { class: "dot", r: 3.5, visibility: "hidden" });
    picture.append(...paths, dot);
    box.replaceChildren(picture);
  }

  function track(one) {
    let text = "", pen = "M";
    one.y.forEach((y, i) => {
      const gone = y === null || (log && y <= 0);
      if (!gone) text += `${pen}${px(one.x[i]).toFixed(1)},${py(y).toFixed(1)}`;
      if (!gone && pen === "M" && (one.y[i + 1] ?? null) === null) text += "h.01";
      pen = gone ? "M" : "L";
    });
    return text;
  }

  function go(s, i) {
    at = [(s + series.length) % series.length, Math.min(Math.max(i, 0), xs.length - 1)];
    const value = (one) => one.y[one.x.indexOf(xs[at[1]])] ?? null, one = series[at[0]];
    paths.forEach((path, k) => alone && path.classList.toggle("on", k === at[0]));
    box.classList.toggle("picked", alone);
    const y = value(one), seen = y !== null && (!log || y > 0);
    dot.setAttribute("visibility", seen ? "visible" : "hidden");
    if (seen) fill(dot, { cx: px(xs[at[1]]), cy: py(y), fill: one.colour }, []);
    const all = series.map((each) => (series.length > 1 ? `${each.label}: ` : "") + figure(value(each))).join(", ");
    said.tell(alone ? `${one.label}, ${xTitle} ${figure(xs[at[1]])}: ${figure(y)}${one.note}` : `${xTitle} ${figure(xs[at[1]])}: ${all}`);
  }

  function leave() {
    box.classList.remove("picked");
    paths.forEach((path) => path.classList.remove("on"));
    if (dot) dot.setAttribute("visibility", "hidden");
    said.tell("");
  }

  box.addEventListener("pointermove", (event) => {
    const area = box.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
    const near = (list, far) => list.reduce((best, item, k) => (far(item) < far(list[best]) ? k : best), 0);
    const i = near(xs, (value) => Math.abs(px(value) - x));
    const away = (one) => Math.abs((one.y[one.x.indexOf(xs[i])] ?? null) === null ? 1e9 : py(one.y[one.x.indexOf(xs[i])]) - y);
    go(near(series, away), i);
  });
  box.addEventListener("pointerleave", leave);
  box.addEventListener("blur", leave);
  box.addEventListener("focus", () => box.matches(":focus-visible") && go(...at));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step) {
      event.preventDefault();
      go(at[0] + step[0], at[1] + step[1]);
    }
  });
  whenSized(box, draw);
  draw();
}

// Four or so round values around a range; on a log scale 1, 2 and 5 times powers of ten inside it.
function ticks(low, high, log) {
  if (log && high - low <= 0.6) return ticks(10 ** low, 10 ** high, false).filter((mark) => mark > 0).map(Math.log10);
  if (log) {
    const steps = high - low > 2.5 ? [1] : [1, 2, 5], found = [];
    for (let power = Math.floor(low); power <= high; power++) found.push(...steps.map((step) => power + Math.log10(step)));
    const inside = found.filter((mark) => mark >= low && mark <= high);
    return inside.length > 8 ? inside.filter((_, i) => i % 2 === 0) : inside;
  }
  const raw = Math.max((high - low) / 4, Math.abs(high) * 1e-3, 1e-9), size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * size).find((one) => one >= raw * 0.999);
  const found = [];
  for (let k = Math.floor(low / step + 1e-6); k <= Math.ceil(high / step - 1e-6); k++) found.push(Number((k * step).toPrecision(10)));
  return found.length > 1 ? found : [found[0], found[0] + step];
}

// What the lines mean, by colour and by dashes.
function key(series) {
  const item = ({ label, colour, dash }) => el("span", { class: "sign" },
    shape("svg", { width: 26, height: 8, "aria-hidden": "true" }, shape("path", { d: "M1,4h24", class: "series", stroke: colour, "stroke-dasharray": dash })), label);
  return el("div", { class: "legend" }, ...series.map(item));
}

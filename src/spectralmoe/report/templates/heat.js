// A heat map on a canvas: pointer and arrow keys read its cells.
//   rows, columns: names.  cell(r, c): a number, NaN for no data, undefined where there is no cell.
//   paint(value): [r, g, b].  mark(value, r): whether it gets a cross.  write(value): its text.  tell(r, c): a sentence.
function heatMap(host, options) {
  const { label, rows, columns, rowTitle, columnTitle, cell, paint, tell } = options;
  const canvas = el("canvas", { "aria-hidden": "true" }), cursor = el("div", { class: "cursor", hidden: true });
  const box = el("div", { class: "heat", tabindex: 0, role: "application", "aria-roledescription": "heat map",
    "aria-label": `${label}. Arrow keys read the values.` }, canvas, cursor);
  const said = readout("Point at a cell, or focus the map and use the arrow keys.");
  host.append(box, said.node);
  let at = [0, 0], place = null;

  const measure = () => {
    const pen = canvas.getContext("2d"), width = box.clientWidth;
    pen.font = "11px system-ui, sans-serif";
    const names = rows().map(String), left = Math.min(Math.max(...names.map((name) => pen.measureText(name).width)) + 8, width / 3);
    const w = Math.max(Math.min((width - left - 18) / columns().length, options.square ? 560 / names.length : 46, options.widest || 46), 2);
    const h = options.square ? w : Math.max(Math.min(460 / names.length, Math.max(w, 14), options.highest || 26), options.lowest || 7);
    return { left: left + 16, top: 30, w, h };
  };

  function draw() {
    if (!box.clientWidth) return;
    place = measure();
    const { left, top, w, h } = place, names = rows(), heads = columns(), colours = palette();
    const width = Math.ceil(left + heads.length * w + 2), height = Math.ceil(top + names.length * h + 2), ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const gap = Math.min(w, h) >= 8 ? 1 : 0, hatch = hatched(pen, colours.hatch);
    for (let r = 0; r < names.length; r++) {
      for (let c = 0; c < heads.length; c++) {
        const value = cell(r, c);
        if (value === undefined) continue;
        const x = left + c * w, y = top + r * h, colour = Number.isNaN(value) ? null : paint(value);
        pen.fillStyle = colour ? css(colour) : hatch;
        pen.fillRect(x, y, w - gap + (gap ? 0 : 0.4), h - gap + (gap ? 0 : 0.4));
        if (colour && options.mark && options.mark(value, r)) cross(pen, x, y, w - gap, h - gap, over(colour));
        else if (colour && w >= 36 && h >= 16) write(pen, (options.write || brief)(value), x + (w - gap) / 2, y + h / 2, over(colour));
      }
    }
    titles(pen, colours, names, heads, { left, top, w, h, height });
    canvas.dataset.drawn = `${names.length} x ${heads.length}`;
  }

  function titles(pen, colours, names, heads, { left, top, w, h, height }) {
    const every = (size, room) => Math.max(Math.ceil(room / size), 1);
    pen.fillStyle = colours.soft;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const down = every(h, 12), widest = Math.max(...heads.map((head) => pen.measureText(String(head)).width));
    names.forEach((name, r) => r % down === 0 && pen.fillText(String(name), left - 5, top + r * h + h / 2, left - 20));
    pen.textAlign = "center";
    const across = every(w, widest + 8);
    heads.forEach((head, c) => c % across === 0 && pen.fillText(String(head), Math.min(left + c * w + w / 2, left + heads.length * w - pen.measureText(String(head)).width / 2), top - 8));
    pen.textAlign = "left";
    pen.fillText(columnTitle(), left, 7);
    pen.save();
    pen.translate(7, Math.min(top + (names.length * h) / 2, height - 4));
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(rowTitle(), 0, 0);
    pen.restore();
  }

  function go(r, c) {
    const [height, width] = [rows().length, columns().length];
    at = [Math.min(Math.max(r, 0), height - 1), Math.min(Math.max(c, 0), width - 1)];
    if (!place) return;
    cursor.hidden = false;
    Object.assign(cursor.style, { left: `${place.left + at[1] * place.w - 1}px`, top: `${place.top + at[0] * place.h - 1}px`,
      width: `${place.w + 1}px`, height: `${place.h + 1}px` });
    said.tell(tell(at[0], at[1]));
  }

  const leave = () => {
    cursor.hidden = true;
    said.tell("");
  };
  box.addEventListener("pointermove", (event) => {
    const area = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - area.left - place.left) / place.w), r = Math.floor((event.clientY - area.top - place.top) / place.h);
    if (r >= 0 && c >= 0 && r < rows().length && c < columns().length) go(r, c);
    else if (document.activeElement !== box) leave();
  });
  box.addEventListener("pointerleave", () => document.activeElement !== box && leave());
  box.addEventListener("focus", () => box.matches(":focus-visible") && go(...at));
  box.addEventListener("blur", leave);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e9], End: [0, 1e9] }[event.key];
    if (step) {
      event.preventDefault();
      go(at[0] + step[0], at[1] + step[1]);
    }
  });
  if (options.pick) box.addEventListener("click", () => options.pick(...at));
  redraws.add(draw);
  whenSized(box, draw);
  draw();
  return draw;
}

function hatched(pen, colour) {
  const tile = el("canvas", { width: 6, height: 6 }), brush = tile.getContext("2d");
  brush.strokeStyle = colour;
  for (const shift of [-6, 0, 6]) {
    brush.moveTo(shift, 6);
    brush.lineTo(shift + 6, 0);
  }
  brush.stroke();
  return pen.createPattern(tile, "repeat");
}

function cross(pen, x, y, w, h, colour) {
  const size = Math.min(w, h, 12) * 0.27;
  pen.strokeStyle = colour;
  pen.lineWidth = size < 2.5 ? 0.8 : 1.2;
  pen.beginPath();
  for (const way of [1, -1]) {
    pen.moveTo(x + w / 2 - size, y + h / 2 - way * size);
    pen.lineTo(x + w / 2 + size, y + h / 2 + way * size);
  }
  pen.stroke();
}

function write(pen, text, x, y, colour) {
  pen.fillStyle = colour;
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillText(text, x, y);
}

// Small pictures, one a button; the chosen one is shown large elsewhere. draw(canvas) paints one.
function gallery(label, items, pick, square = false) {
  const buttons = items.map(({ text, draw }, i) => {
    const canvas = el("canvas", { "aria-hidden": "true" });
    const paint = () => draw(canvas);
    paint();
    redraws.add(paint);
    return el("button", { type: "button", class: square && "square", "aria-pressed": "false", onclick: () => pick(i) }, canvas, el("span", {}, text));
  });
  const show = (i) => buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === i)));
  return { node: el("div", { class: "gallery", role: "group", "aria-label": label }, ...buttons), show };
}

// All cells of a small picture, one pixel each.
function thumbnail(canvas, height, width, colour) {
  canvas.width = Math.max(width, 1);
  canvas.height = Math.max(height, 1);
  const pen = canvas.getContext("2d"), picture = pen.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < height * width; i++) picture.data.set([...colour(Math.floor(i / width), i % width), 255], 4 * i);
  pen.putImageData(picture, 0, 0);
  canvas.dataset.drawn = `${height} x ${width}`;
}

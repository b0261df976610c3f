// The chosen runs as a table, a page of rows at a time.
const ROWS = 50;
const SPARKS = ["nc0", "nc1", "nc2", "nc3"];

function tableColumns() {
  const metrics = [...SPARKS, "nc4", "train_accuracy", "val_accuracy"];
  const own = page.columns.filter((column) => column.own).slice(0, 4);
  return [
    ...page.columns.filter((column) => column.role === "setting"), page.byName.get("status"),
    ...metrics.map((name) => page.byName.get(name)), ...own,
  ].filter(Boolean);
}

// The chosen runs in the table's order; missing numbers come last.
function sorted() {
  const [name, up] = state.sort;
  const { values, words } = page.byName.get(name);
  const value = words ? (i) => page.rank[name][values[i]] : (i) => values[i];
  const sign = up ? 1 : -1;
  return [...chosen.list].sort((a, b) => {
    const [p, q] = [value(a), value(b)];
    return Number.isNaN(p) - Number.isNaN(q) || (Number.isNaN(p) ? 0 : sign * (p < q ? -1 : p > q ? 1 : 0)) || a - b;
  });
}

function drawTable() {
  const columns = tableColumns();
  const head = element("tr");
  for (const column of columns) {
    const button = element("button", { type: "button", textContent: column.label, title: column.about ?? "" });
    button.addEventListener("click", () => {
      state.sort = [column.name, state.sort[0] === column.name ? !state.sort[1] : true];
      state.first = 0;
      changed();
      document.querySelectorAll("#runs th button")[columns.indexOf(column)].focus({ preventScroll: true });
    });
    const cell = element("th", { scope: "col", className: column.words ? "words" : "" }, button);
    if (state.sort[0] === column.name) cell.setAttribute("aria-sort", state.sort[1] ? "ascending" : "descending");
    head.append(cell);
  }
  head.append(element("th", { scope: "col", className: "words plain", textContent: "run" }));
  document.querySelector("#runs thead").replaceChildren(head);
  const order = sorted();
  state.first = Math.min(state.first, Math.max(0, Math.floor((order.length - 1) / ROWS) * ROWS));
  const shown = order.slice(state.first, state.first + ROWS);
  document.querySelector("#runs tbody").replaceChildren(...shown.map((i) => row(i, columns)));
  const last = state.first + shown.length;
  const place = `${grouped(state.first + 1)}–${grouped(last)} of ${grouped(order.length)}`;
  say("place", order.length ? place : "no runs chosen");
  document.getElementById("back").disabled = state.first === 0;
  document.getElementById("on").disabled = last >= order.length;
}

function row(i, columns) {
  const made = element("tr");
  for (const column of columns) {
    const cell = element("td", { className: column.words ? "words" : "" });
    if (column.name === "optimizer") cell.append(glyph(lookOf(i)));
    if (SPARKS.includes(column.name)) {
      cell.append(spark(i, column.name), element("span", { className: "value", textContent: column.text(i) }));
    } else cell.append(column.text(i));
    if (column.words) cell.title = column.text(i);
    made.append(cell);
  }
  made.append(element("td", { className: "words" }, element("code", { textContent: page.ids[i] })));
  made.dataset.run = i;
  return made;
}

// The small curve of a metric, in its own range.
function spark(i, name) {
  const svg = drawn("svg", { class: "spark", viewBox: "0 0 70 22", "aria-hidden": "true", style: `--stroke: var(--${lookOf(i).family})` });
  const values = page.arrays[`curve ${name}`]?.subarray(page.offsets[i], page.offsets[i] + page.count[i]) ?? [];
  const place = spans(values) ? log : Number;
  const epochs = page.arrays.epoch;
  const points = [...values].map((value, k) => [epochs[page.offsets[i] + k], place(value)])
    .filter(([, y]) => Number.isFinite(y));
  if (points.length < 2) return svg;
  const ys = points.map(([, y]) => y);
  const [low, high, end] = [Math.min(...ys), Math.max(...ys), points.at(-1)[0] || 1];
  const to = ([x, y]) => [2 + (66 * x) / end, 20 - (18 * (y - low)) / (high - low || 1)].map((at) => at.toFixed(1)).join(" ");
  svg.append(drawn("path", { d: `M${points.map(to).join("L")}` }));
  return svg;
}

// An optimizer's line and point, as in the charts.
function glyph(look) {
  const svg = drawn("svg", { viewBox: "0 0 26 14", "aria-hidden": "true", style: "width: 1.6rem; height: .9rem" });
  const dash = { solid: "none", dash: "6 3", dashdot: "6 2 1 2" }[look.dash];
  const shapes = {
    circle: "M9 7a4 4 0 1 0 8 0a4 4 0 1 0-8 0", diamond: "M13 2l5 5l-5 5l-5-5Z", "triangle-up": "M13 2l5 9h-10Z",
  };
  const stroke = `var(--${look.family})`;
  svg.append(
    drawn("line", { x1: 0, x2: 26, y1: 7, y2: 7, stroke, "stroke-width": 2, "stroke-dasharray": dash }),
    drawn("path", { d: shapes[look.mark], style: `fill: ${stroke}; stroke: none` }),
  );
  return svg;
}

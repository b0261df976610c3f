// What is chosen, shared by all charts, and kept in the URL's hash.
const page = {}; // filled by `start.js`: columns, byName, ids, looks, curves, offsets
const chosen = { mark: null, list: [] };
let state = {};

function fresh() {
  const metrics = [...page.byName.values()].filter((column) => column.role === "metric").map((column) => column.name);
  const pick = (...names) => names.find((name) => metrics.includes(name)) ?? metrics[0] ?? "";
  const x = pick("nc0");
  const y = pick("nc3", "nc2", "nc1");
  const metric = page.curves.metrics.includes(x) ? x : page.curves.metrics[0] ?? "";
  return {
    ranges: {}, without: {}, fit: false, region: null, // what is chosen
    x, y, metric, logs: {}, sort: [x || "optimizer", true], axes: null, first: 0, // how it is shown
  };
}

// The hash may be of another page, or typed: what does not fit is dropped.
function readHash() {
  state = fresh();
  let given;
  try { given = JSON.parse(decodeURIComponent(location.hash.slice(1))); } catch { return; }
  if (given === null || typeof given !== "object") return;
  const known = (name) => typeof name === "string" && page.byName.has(name);
  const numbers = (list, length = list?.length) => Array.isArray(list) && list.every(Number.isFinite) && list.length === length;
  for (const [name, range] of Object.entries(given.ranges ?? {})) {
    if (known(name) && numbers(range, 2)) state.ranges[name] = range;
  }
  for (const name of ["optimizer", "status"]) {
    const keys = given.without?.[name];
    if (Array.isArray(keys)) state.without[name] = keys.filter((key) => typeof key === "string");
  }
  const { x, y, xs, ys, logs } = given.region ?? {};
  if ([x, y].every(isNumeric) && numbers(xs) && xs.length > 2 && numbers(ys, xs.length)) {
    state.region = { x, y, xs, ys, logs: [logs?.[0] === true, logs?.[1] === true] };
  }
  for (const key of ["x", "y"]) if (isNumeric(given[key])) state[key] = given[key];
  if (page.curves.metrics.includes(given.metric)) state.metric = given.metric;
  for (const [name, value] of Object.entries(given.logs ?? {})) if (known(name)) state.logs[name] = value === true;
  if (Array.isArray(given.sort) && known(given.sort[0])) state.sort = [given.sort[0], given.sort[1] === true];
  if (Array.isArray(given.axes)) state.axes = given.axes.filter(known);
  if (Number.isInteger(given.first) && given.first >= 0) state.first = given.first;
  state.fit = given.fit === true;
}

function writeHash() {
  const usual = fresh();
  const differs = ([key, value]) => JSON.stringify(value) !== JSON.stringify(usual[key]);
  const own = Object.fromEntries(Object.entries(state).filter(differs));
  const hash = Object.keys(own).length ? `#${encodeURIComponent(JSON.stringify(own))}` : "";
  try { history.replaceState(null, "", hash || location.pathname + location.search); } catch { /* not allowed here */ }
}

const isNumeric = (name) => typeof name === "string" && page.byName.has(name) && !page.byName.get(name).words;
const isLog = (name) => state.logs[name] ?? page.byName.get(name)?.log ?? false;

// Whether a point lies in a polygon; both in the data's own units.
function inside(x, y, xs, ys) {
  let within = false;
  for (let i = 0, j = xs.length - 1; i < xs.length; j = i++) {
    if (ys[i] > y !== ys[j] > y && x < ((xs[j] - xs[i]) * (y - ys[i])) / (ys[j] - ys[i]) + xs[i]) within = !within;
  }
  return within;
}

// Mark the runs that pass all filters.
function choose() {
  const tests = Object.entries(state.ranges).map(([name, [low, high]]) => {
    const { at } = page.byName.get(name);
    return (i) => at[i] >= low && at[i] <= high;
  });
  for (const [name, keys] of Object.entries(state.without)) {
    const { values, keys: all } = page.byName.get(name);
    const out = new Set(keys.map((key) => all.indexOf(key)));
    if (keys.length) tests.push((i) => !out.has(values[i]));
  }
  const accuracy = page.byName.get("train_accuracy")?.values;
  const { values: status, keys } = page.byName.get("status");
  if (state.fit) tests.push((i) => keys[status[i]] === "done" && accuracy && accuracy[i] >= Math.fround(page.threshold));
  if (state.region) {
    // A straight edge on the screen is straight in logarithms, if the axis was logarithmic when it was drawn.
    const { x, y, xs, ys, logs } = state.region;
    const [place, other] = logs.map((logarithmic) => logarithmic ? log : Number);
    const [px, py, vx, vy] = [xs.map(place), ys.map(other), page.byName.get(x).values, page.byName.get(y).values];
    tests.push((i) => inside(place(vx[i]), other(vy[i]), px, py));
  }
  chosen.list = [];
  chosen.mark = new Uint8Array(page.ids.length);
  for (let i = 0; i < page.ids.length; i++) {
    if (tests.every((passes) => passes(i))) { chosen.mark[i] = 1; chosen.list.push(i); }
  }
}

const say = (id, text) => { document.getElementById(id).textContent = text; };
const codeOf = (i) => page.byName.get("optimizer").values[i];

// A colour of the page; while it is printed, that on light ground.
function colour(name) {
  const style = page.printing ? document.styleSheets[0].cssRules[0].style : getComputedStyle(document.documentElement);
  return style.getPropertyValue(`--${name}`).trim();
}

const lookOf = (i) => page.looks[codeOf(i)];

// What a tooltip says of a run: its settings, its metrics, its name.
function describe(i) {
  const settings = page.columns.filter((column) => column.role === "setting");
  const metrics = page.columns.filter((column) => column.role === "metric").slice(0, 12);
  const text = (column) => `${column.label} ${column.text(i)}`;
  const [optimizer, ...others] = settings;
  const status = page.byName.get("status").text(i);
  const end = `${status === "done" ? "" : `${status}; `}run ${page.ids[i]}`;
  return [`${optimizer.text(i)}  ${others.map(text).join("  ")}`, ...metrics.map(text), end].join("\n");
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// `kept` of the list, evenly spaced.
function thinned(list, kept) {
  if (list.length <= kept) return list;
  return Array.from({ length: kept }, (_, i) => list[Math.round((i * (list.length - 1)) / (kept - 1))]);
}

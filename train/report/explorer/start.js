// Everything together: controls, what a change redraws, and the start.
let soon;

// Show a change of the state; while a pointer is dragged, only what is quick.
function changed({ quick = false } = {}) {
  choose();
  showBar();
  clearTimeout(soon);
  soon = setTimeout(() => {
    parallel.draw();
    if (quick) return;
    drawScatter();
    drawCurves();
    drawTable();
    showControls();
    writeHash();
  });
}

function showBar() {
  const [m, n] = [page.ids.length, chosen.list.length].map(grouped);
  document.getElementById("count").textContent = `${n} of ${m} ${page.ids.length === 1 ? "run" : "runs"} chosen`;
  const chips = [];
  const chip = (text, drop) => {
    const button = element("button", { type: "button", textContent: `${text} ✕`, title: "Drop this condition" });
    button.addEventListener("click", () => { drop(); changed(); });
    chips.push(button);
  };
  for (const [name, range] of Object.entries(state.ranges)) {
    const column = page.byName.get(name);
    chip(`${column.label}: ${short(rangeText(column, range), 60)}`, () => { delete state.ranges[name]; });
  }
  for (const [name, keys] of Object.entries(state.without)) {
    const { keys: all, words } = page.byName.get(name);
    for (const key of keys.filter((one) => all.includes(one))) {
      chip(`without ${words[all.indexOf(key)]}`, () => { state.without[name] = state.without[name].filter((one) => one !== key); });
    }
  }
  if (state.fit) chip(`train accuracy ≥ ${Number((100 * page.threshold).toPrecision(6))} %`, () => { state.fit = false; });
  if (state.region) {
    const [x, y] = [state.region.x, state.region.y].map((name) => page.byName.get(name).label);
    chip(`region of ${x} and ${y}`, () => { state.region = null; });
  }
  document.getElementById("filters").replaceChildren(...(chips.length ? chips : ["No condition: all runs are chosen."]));
}

// Controls show the state, which the hash or another control may have changed.
function showControls() {
  for (const id of ["x", "y", "metric"]) document.getElementById(id).value = state[id];
  for (const id of ["x", "y"]) document.getElementById(`${id}-log`).checked = isLog(state[id]);
  document.getElementById("metric-log").checked = curveLog();
  document.getElementById("fit").checked = state.fit;
  for (const input of document.querySelectorAll("[data-key]")) {
    input.checked = !(state.without[input.dataset.column] ?? []).includes(input.dataset.key);
  }
  const shown = new Set(axesShown().map((column) => column.name));
  for (const input of document.querySelectorAll("#axes input")) input.checked = shown.has(input.value);
}

function tick(text, checked, change, ...before) {
  const input = element("input", { type: "checkbox", checked });
  input.addEventListener("change", () => { change(input.checked); changed(); });
  return [element("label", {}, input, ...before, short(text, 60)), input];
}

function makeControls() {
  const numeric = page.columns.filter((column) => !column.words);
  const option = (column) => element("option", { value: column.name, textContent: short(column.label, 60), title: column.about ?? "" });
  document.getElementById("x").append(...numeric.map(option));
  document.getElementById("y").append(...numeric.map(option));
  document.getElementById("metric").append(...page.curves.metrics.map((name) => option(page.byName.get(name))));
  for (const id of ["x", "y", "metric"]) {
    document.getElementById(id).addEventListener("change", (event) => { state[id] = event.target.value; changed(); });
    document.getElementById(`${id}-log`).addEventListener("change", (event) => {
      state.logs[id === "metric" ? `curve ${state.metric}` : state[id]] = event.target.checked;
      changed();
    });
  }
  for (const [name, place] of [["optimizer", "optimizers"], ["status", "statuses"]]) {
    const { words, keys, values } = page.byName.get(name);
    const counts = new Array(words.length).fill(0);
    for (const code of values) counts[code] += 1;
    keys.forEach((key, k) => {
      const [label, input] = tick(`${words[k]} (${grouped(counts[k])})`, true, (checked) => {
        const without = new Set(state.without[name]);
        if (checked) without.delete(key); else without.add(key);
        state.without[name] = [...without];
      }, ...(name === "optimizer" ? [glyph(page.looks[k])] : []));
      Object.assign(input.dataset, { column: name, key });
      document.getElementById(place).append(label);
    });
  }
  for (const column of page.columns) {
    const [label, input] = tick(column.label, false, (checked) => {
      const names = axesShown().map((one) => one.name);
      const wanted = new Set(checked ? [...names, column.name] : names.filter((one) => one !== column.name));
      state.axes = page.columns.map((one) => one.name).filter((one) => wanted.has(one));
    });
    input.value = column.name;
    document.getElementById("axes").append(label);
  }
  document.getElementById("fit").addEventListener("change", (event) => { state.fit = event.target.checked; changed(); });
  document.getElementById("reset").addEventListener("click", () => {
    Object.assign(state, { ranges: {}, without: {}, fit: false, region: null, first: 0 });
    changed();
  });
  document.getElementById("copy").addEventListener("click", copyIds);
  document.getElementById("back").addEventListener("click", () => { state.first = Math.max(0, state.first - ROWS); changed(); });
  document.getElementById("on").addEventListener("click", () => { state.first += ROWS; changed(); });
}

// Copy the ids of the chosen runs, in the table's order, a line each.
async function copyIds() {
  const text = sorted().map((i) => page.ids[i]).join("\n");
  const said = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = `${grouped(chosen.list.length)} ids copied`;
  } catch { // not allowed here: they can be copied by hand
    const area = element("textarea", { value: text, readOnly: true, rows: 2, cols: 14, ariaLabel: "Ids of the chosen runs" });
    said.replaceChildren(area);
    area.select();
  }
}

function showTip(text, x, y) {
  const tip = document.getElementById("tip");
  tip.hidden = false;
  tip.textContent = text;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(x + 14, room))}px`;
  tip.style.top = `${Math.max(8, y + 14 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 14)}px`;
}

// The run that the pointer is on, in all charts.
function focusOn(i) {
  if (i === null) document.getElementById("tip").hidden = true;
  parallel.focus(i);
  focusCurve(i);
  for (const one of document.querySelectorAll("#runs tr.focus")) one.classList.remove("focus");
  if (i !== null) document.querySelector(`#runs tr[data-run="${i}"]`)?.classList.add("focus");
}

async function start() {
  const header = unpack(await inflate("data"));
  page.curves = unpack(await inflate("curve-data"));
  Object.assign(header.arrays, page.curves.arrays);
  Object.assign(page, header);
  page.columns = header.columns.map((column) => makeColumn(column, header.arrays));
  page.byName = new Map(page.columns.map((column) => [column.name, column]));
  page.all = page.ids.map((_, i) => i);
  page.rank = {};
  for (const { name, words } of page.columns.filter((column) => column.words)) {
    const order = words.map((_, k) => k);
    if (name !== "optimizer") order.sort((a, b) => words[a].localeCompare(words[b], "en", { numeric: true }));
    page.rank[name] = order.map((_, k) => order.indexOf(k));
  }
  page.count = header.arrays.count;
  page.offsets = new Uint32Array(page.count.length);
  for (let i = 1; i < page.count.length; i++) page.offsets[i] = page.offsets[i - 1] + page.count[i - 1];
  document.head.append(element("script", { textContent: new TextDecoder().decode(await inflate("plotly")) }));
  makeControls();
  readHash();
  choose();
  showBar();
  parallel.draw();
  await Promise.all([drawScatter(), drawCurves()]);
  drawTable();
  showControls();
  if (document.getElementById("scatter").on) { listenToScatter(); listenToHover("scatter"); }
  if (document.getElementById("curves").on) listenToHover("curves");
  const body = document.querySelector("#runs tbody");
  body.addEventListener("pointerover", (event) => {
    const run = event.target.closest("tr")?.dataset.run;
    if (run !== undefined) focusOn(Number(run));
  });
  body.addEventListener("pointerleave", () => focusOn(null));
  document.addEventListener("scroll", () => { document.getElementById("tip").hidden = true; }, { passive: true, capture: true });
  addEventListener("hashchange", () => { readHash(); changed(); });
  new ResizeObserver(() => parallel.draw()).observe(document.querySelector("#settings-to-metrics .scroll"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => changed());
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => { page.printing = printing; parallel.draw(); drawScatter(); drawCurves(); });
  }
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  const note = document.getElementById("failed");
  note.hidden = false;
  note.textContent = `The charts could not be made: ${error.message}. A newer browser may help; the tables of the report need none.`;
  throw error;
});

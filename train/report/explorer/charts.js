// The charts that Plotly draws: one column against another, and a metric over epochs.
const MOST_CURVES = 300;
const SVG_POINTS = 8000; // beyond, points are drawn by WebGL
const CHOOSE = ["select2d", "lasso2d"];
const VIEW = ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"];
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // Plotly reads a little HTML

function layout(x, y) {
  const axis = ({ label, log: isLogarithmic }) => ({
    title: { text: plain(short(label, 60)), standoff: 8 }, type: isLogarithmic ? "log" : "linear", automargin: true,
    gridcolor: colour("grid"), linecolor: colour("quiet"), zeroline: false, exponentformat: "power",
  });
  return {
    xaxis: axis(x), yaxis: axis(y), paper_bgcolor: "transparent", plot_bgcolor: "transparent", showlegend: false,
    font: { family: "system-ui, sans-serif", size: 12, color: colour("ink") }, margin: { l: 50, r: 12, t: 34, b: 44 },
    hovermode: "closest", modebar: { bgcolor: "transparent", color: colour("quiet"), activecolor: colour("accent") },
  };
}

const config = (...buttons) => ({
  responsive: true, displaylogo: false, displayModeBar: true, doubleClick: "reset+autosize",
  modeBarButtons: [buttons], toImageButtonOptions: { format: "svg", filename: "ncollapse" },
});

function drawScatter() {
  const [x, y] = [page.byName.get(state.x), page.byName.get(state.y)];
  if (!x || !y) {
    say("scatter-note", "No points: no metric has a value in any run.");
    return null;
  }
  const type = page.ids.length > SVG_POINTS ? "scattergl" : "scatter";
  // What is chosen has its own colours: Plotly's marks of selected points are switched off.
  const same = ({ opacity }) => ({ marker: { opacity } });
  const trace = (runs, marker) => ({
    type, mode: "markers", x: runs.map((i) => x.values[i]), y: runs.map((i) => y.values[i]), customdata: runs, marker,
    hoverinfo: "none", selectedpoints: null, selected: same(marker), unselected: same(marker),
  });
  const others = page.all.filter((i) => !chosen.mark[i]);
  const traces = [{ ...trace(others, { color: colour("quiet"), size: 4, opacity: 0.25 }), hoverinfo: "skip" }];
  for (const [k, look] of page.looks.entries()) {
    const runs = chosen.list.filter((i) => codeOf(i) === k);
    const line = { color: colour("card"), width: 0.5 };
    const marker = { color: colour(look.family), symbol: look.mark, size: runs.length > 2000 ? 5 : 7, opacity: 0.8, line };
    if (runs.length) traces.push(trace(runs, marker));
  }
  const lacks = ({ name, values }, i) => !Number.isFinite(isLog(name) ? log(values[i]) : values[i]);
  const missing = chosen.list.filter((i) => lacks(x, i) || lacks(y, i)).length;
  const why = "a value is missing, infinite or, on a logarithmic axis, not positive";
  say("scatter-note", missing ? `${counted(missing, "chosen run has", "chosen runs have")} no point: ${why}.` : "");
  const { region } = state;
  const shape = region && region.x === x.name && region.y === y.name ? [outline(region)] : [];
  return Plotly.react("scatter", traces, {
    ...layout({ ...x, log: isLog(x.name) }, { ...y, log: isLog(y.name) }),
    dragmode: page.dragmode ?? "select", shapes: shape, selections: [], selectionrevision: Math.random(),
    uirevision: `${x.name} ${isLog(x.name)} ${y.name} ${isLog(y.name)}`, // a zoom stays while the axes do
  }, config(...CHOOSE, ...VIEW));
}

// The region as a shape of the layout.
function outline({ xs, ys }) {
  const path = `${xs.map((x, i) => `${i ? "L" : "M"}${x},${ys[i]}`).join("")}Z`;
  const line = { color: colour("accent"), width: 1.5, dash: "dot" };
  return { type: "path", path, line, fillcolor: colour("accent"), opacity: 0.12, layer: "below" };
}

function listenToScatter() {
  const chart = document.getElementById("scatter");
  chart.on("plotly_selected", (event) => {
    if (!event?.range && !event?.lassoPoints) return;
    const { x, y } = event.range ?? event.lassoPoints;
    const [xs, ys] = event.range ? [[x[0], x[1], x[1], x[0]], [y[0], y[0], y[1], y[1]]] : [x, y];
    const corners = thinned([...xs.keys()], 60); // of a lasso with hundreds: the address holds them
    const brief = (values) => corners.map((k) => Number(values[k].toPrecision(6)));
    const logs = [isLog(state.x), isLog(state.y)];
    state.region = { x: state.x, y: state.y, xs: brief(xs), ys: brief(ys), logs };
    changed();
  });
  chart.on("plotly_deselect", () => { state.region = null; changed(); });
  chart.on("plotly_relayout", (event) => { if (event.dragmode) page.dragmode = event.dragmode; });
}

function listenToHover(id) {
  const chart = document.getElementById(id);
  chart.on("plotly_hover", ({ points, event }) => {
    if (points[0].customdata === undefined) return;
    focusOn(points[0].customdata);
    showTip(describe(points[0].customdata), event.clientX, event.clientY);
  });
  chart.on("plotly_unhover", () => focusOn(null));
}

function drawCurves() {
  const name = state.metric;
  const values = page.arrays[`curve ${name}`];
  if (!values) {
    say("curves-note", "No curves: no run was evaluated, or the page had no room for them.");
    return null;
  }
  const all = chosen.list.filter((i) => page.count[i] > 0);
  const runs = thinned(all, MOST_CURVES);
  const some = `${runs.length} of ${grouped(all.length)} chosen runs are drawn, evenly spaced; choose fewer to see each.`;
  const without = chosen.list.length - all.length;
  const lack = without ? `${counted(without, "chosen run has", "chosen runs have")} no curve.` : "";
  say("curves-note", runs.length < all.length ? some : lack);
  const many = runs.length > 60;
  const traces = page.looks.map((look, k) => {
    const own = runs.filter((i) => codeOf(i) === k);
    const [x, y, customdata] = [[], [], []];
    for (const i of own) {
      for (let at = page.offsets[i]; at < page.offsets[i] + page.count[i]; at++) {
        x.push(page.arrays.epoch[at]); y.push(values[at]); customdata.push(i);
      }
      x.push(null); y.push(null); customdata.push(i);
    }
    return {
      type: "scatter", mode: own.every((i) => page.count[i] === 1) ? "markers" : "lines", x, y, customdata,
      hoverinfo: "none", opacity: many ? 0.5 : 0.85, connectgaps: false,
      line: { color: colour(look.family), width: many ? 1 : 1.8, dash: look.dash },
    };
  }).filter((trace) => trace.x.length);
  traces.push({ type: "scatter", mode: "lines", x: [], y: [], hoverinfo: "skip", line: { color: colour("ink"), width: 3 } });
  return Plotly.react("curves", traces, {
    ...layout({ label: "epoch", log: false }, { label: page.byName.get(name).label, log: curveLog() }),
    dragmode: "zoom", uirevision: `${name} ${curveLog()}`,
  }, config(...VIEW));
}

// Curves may span decades where the ends of the runs do not.
function curveLog() {
  const name = `curve ${state.metric}`;
  return state.logs[name] ?? (!isShare(state.metric) && page.arrays[name] !== undefined && spans(page.arrays[name]));
}

function focusCurve(i) {
  const chart = document.getElementById("curves");
  const values = page.arrays[`curve ${state.metric}`];
  if (!values || !chart.data?.length) return;
  const [from, to] = i === null ? [0, 0] : [page.offsets[i], page.offsets[i] + page.count[i]];
  const update = { x: [[...page.arrays.epoch.subarray(from, to)]], y: [[...values.subarray(from, to)]] };
  Plotly.restyle(chart, update, [chart.data.length - 1]);
}

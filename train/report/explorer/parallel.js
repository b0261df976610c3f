// Parallel coordinates. Plotly has none whose axes are logarithmic and can be brushed between the ticks.
const MARGIN = { top: 34, bottom: 12, left: 14, right: 58 };
const MOST_LINES = 6000;
const NARROWEST = 84; // pixels from an axis to the next

// A number in [0, 1) for each run, evenly spread over runs that follow each other.
const golden = (i) => (i * 0.618034) % 1;
// Runs follow each other by optimizer: drawn in their order, the last optimizer would cover all others.
const mixed = (list) => [...list].sort((a, b) => golden(a) - golden(b));

function axesShown() {
  const usual = [...page.columns.filter((column) => column.role === "setting").slice(0, 8).map((column) => column.name),
    "nc0", "nc1", "nc2", "nc3", "val_accuracy"];
  return (state.axes ?? usual).map((name) => page.byName.get(name)).filter(Boolean);
}

const parallel = {
  columns: [], width: 0, height: 0,
  x(k) { return MARGIN.left + (k * (this.width - MARGIN.left - MARGIN.right)) / Math.max(this.columns.length - 1, 1); },
  y(column, at) {
    const share = (at - column.low) / (column.high - column.low);
    return this.height - MARGIN.bottom - share * (this.height - MARGIN.top - MARGIN.bottom);
  },
  at(column, y) {
    const share = (this.height - MARGIN.bottom - y) / (this.height - MARGIN.top - MARGIN.bottom);
    return column.low + Math.min(1, Math.max(0, share)) * (column.high - column.low);
  },

  draw() {
    const box = document.getElementById("parallel");
    this.columns = axesShown();
    box.style.minWidth = `${MARGIN.left + MARGIN.right + NARROWEST * (this.columns.length - 1)}px`;
    [this.width, this.height] = [box.clientWidth, box.clientHeight];
    this.drawLines();
    this.drawAxes(box.querySelector("svg"));
  },

  drawLines() {
    const context = this.context(0);
    const others = thinned(page.all.filter((i) => !chosen.mark[i]), MOST_LINES / 2);
    const lines = mixed(thinned(chosen.list, MOST_LINES));
    context.globalAlpha = Math.min(0.8, Math.max(0.06, 60 / others.length));
    context.lineWidth = 1;
    for (const i of others) this.line(context, i, colour("line"));
    const colours = new Map(page.looks.map((look) => [look.family, colour(look.family)]));
    context.globalAlpha = Math.min(0.8, Math.max(0.1, 6 / Math.sqrt(lines.length)));
    context.lineWidth = 1.2;
    for (const i of lines) this.line(context, i, colours.get(lookOf(i).family));
    const left = chosen.list.length - lines.length;
    const drawn = `${grouped(lines.length)} of ${grouped(chosen.list.length)} chosen runs are drawn, evenly spaced.`;
    say("parallel-note", left > 0 ? drawn : "");
  },

  // Draw the run that the pointer is on over all others.
  focus(i) {
    const context = this.context(1);
    context.lineWidth = 3;
    if (i !== null) this.line(context, i, colour("ink"));
  },

  context(layer) {
    const canvas = document.querySelectorAll("#parallel canvas")[layer];
    const dense = window.devicePixelRatio || 1;
    [canvas.width, canvas.height] = [this.width * dense, this.height * dense];
    const context = canvas.getContext("2d");
    context.scale(dense, dense);
    return context;
  },

  line(context, i, stroke) {
    context.strokeStyle = stroke;
    context.beginPath();
    // Where many runs share a value, their lines are spread a little, as otherwise all but the last are hidden.
    const spread = page.ids.length > 50 ? 12 * (golden(i) - 0.5) : 0;
    this.columns.forEach((column, k) => {
      context.lineTo(this.x(k), this.y(column, column.at[i]) + (column.discrete ? spread : 0));
    });
    context.stroke();
  },

  drawAxes(svg) {
    svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`); // it shrinks with the lines on paper
    const active = [...svg.children].indexOf(document.activeElement);
    svg.replaceChildren(...this.columns.map((column, k) => this.axis(column, k)));
    if (active >= 0) svg.children[active]?.focus({ preventScroll: true });
  },

  axis(column, k) {
    const group = drawn("g", { transform: `translate(${this.x(k)} 0)`, tabindex: 0, role: "group" });
    const range = state.ranges[column.name];
    group.setAttribute("aria-label", `${column.label}, ${range ? rangeText(column, range) : "all values"}`);
    const [top, bottom] = [MARGIN.top, this.height - MARGIN.bottom];
    group.append(drawn("line", { class: "spine", y1: top, y2: bottom }));
    let last = Infinity;
    for (const tick of [...column.ticks].sort((a, b) => a.at - b.at)) {
      const y = this.y(column, tick.at);
      group.append(drawn("line", { class: "spine", x2: 4, y1: y, y2: y }));
      if (last - y < 12) continue;
      group.append(drawn("text", { x: 7, y: y + 4 }, short(tick.text, 12)));
      last = y;
    }
    const low = k % 2 && this.columns.length > 6; // titles in two rows, so that neighbours do not meet
    const place = { y: low ? 26 : 11, x: k ? 0 : -8, "text-anchor": k ? "middle" : "start" };
    const title = drawn("text", { class: "title", ...place }, short(column.label, 24));
    title.append(drawn("title", {}, column.about ?? column.label));
    group.append(title);
    if (range) {
      const [from, to] = [this.y(column, range[1]), this.y(column, range[0])];
      group.append(drawn("rect", { class: "brush", x: -7, width: 14, y: from, height: Math.max(to - from, 2) }));
    }
    const hit = drawn("rect", { class: "hit", x: -12, width: 24, y: top - 6, height: bottom - top + 12 });
    hit.addEventListener("pointerdown", (event) => this.drag(event, column));
    group.append(hit);
    group.addEventListener("keydown", (event) => this.key(event, column));
    return group;
  },

  drag(event, column) {
    event.preventDefault();
    const svg = document.querySelector("#parallel svg");
    const y = (moved) => moved.clientY - svg.getBoundingClientRect().top;
    const start = y(event);
    const move = (moved) => {
      if (Math.abs(y(moved) - start) < 4) return;
      state.ranges[column.name] = [Math.max(start, y(moved)), Math.min(start, y(moved))].map((end) => this.at(column, end));
      changed({ quick: true });
    };
    const end = (moved) => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      removeEventListener("pointercancel", end);
      if (moved.type === "pointerup" && Math.abs(y(moved) - start) < 4) delete state.ranges[column.name];
      changed();
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  },

  key(event, column) {
    const step = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (event.key === "Delete" || event.key === "Backspace") delete state.ranges[column.name];
    else if (step) {
      const unit = (step * (column.high - column.low)) / 20;
      const [low, high] = state.ranges[column.name] ?? [column.low, column.high];
      const moved = event.shiftKey ? [low, high + unit] : state.ranges[column.name] ? [low + unit, high + unit]
        : step > 0 ? [(low + high) / 2, high] : [low, (low + high) / 2];
      if (moved[0] < moved[1]) state.ranges[column.name] = moved;
    } else return;
    event.preventDefault();
    changed();
  },
};

const short = (text, most) => text.length <= most ? text : `${text.slice(0, most - 1)}…`;

// A range of an axis in the units of its values.
function rangeText(column, [low, high]) {
  if (column.words) {
    return column.ticks.filter(({ at }) => at >= low && at <= high).map((tick) => tick.text).join(", ") || "none";
  }
  const text = (at) => isShare(column.name) ? percentage(at) : number(column.log ? 10 ** at : at);
  const { least, most } = column;
  const numbers = low <= least ? `up to ${text(Math.min(high, most))}` : high >= most ? `from ${text(low)}`
    : `${text(low)} to ${text(high)}`;
  const special = column.ticks.filter(({ at }) => (at < least || at > most) && at >= low && at <= high);
  const parts = high < least || low > most ? [] : [numbers];
  return [...parts, ...special.map((tick) => tick.text)].join(" or ") || "none";
}

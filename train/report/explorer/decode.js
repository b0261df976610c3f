// What `packing.py` packs: base64 of gzip; then the columns of the runs, with a place on an axis for each value.
async function inflate(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Returns the header, with its arrays as typed arrays.
function unpack(bytes) {
  const start = new DataView(bytes.buffer).getUint32(0, true) + 4;
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, start)));
  for (const [name, { kind, at, length }] of Object.entries(header.arrays)) {
    const Kind = { Uint8Array, Uint16Array, Uint32Array, Float32Array, Float64Array }[kind];
    const size = Kind.BYTES_PER_ELEMENT;
    const whole = new Uint8Array(length * size);
    for (let byte = 0; byte < size; byte++) {
      const from = start + at + byte * length;
      for (let i = 0; i < length; i++) whole[i * size + byte] = bytes[from + i];
    }
    header.arrays[name] = new Kind(whole.buffer);
  }
  return header;
}

// As `ncollapse.formatting.number` writes numbers.
function number(value) {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const usual = value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4);
  const [digits, exponent] = (usual ? value.toPrecision(3) : value.toExponential(2)).split("e");
  return (usual ? String(Number(digits)) : digits) + (exponent ? `e${exponent.replace(/^([+-])(\d)$/, "$10$2")}` : "");
}

const power10 = (exponent) => Math.abs(exponent) < 4 ? String(Number((10 ** exponent).toPrecision(6))) : `1e${exponent}`;
const setting = (value) => Number.isNaN(value) ? "–" : String(Number(value.toPrecision(6)));
const percentage = (share) => Number.isNaN(share) ? "–" : `${(100 * share).toFixed(2)} %`;
const isShare = (name) => name === "train_accuracy" || name === "val_accuracy";
const grouped = (count) => count.toLocaleString("en");
const counted = (count, one, several) => `${grouped(count)} ${count === 1 ? one : several}`;
const log = (value) => value > 0 ? Math.log10(value) : NaN;

// Whether positive values span decades, so that an axis of them is logarithmic.
function spans(values, factor = 10) {
  let [low, high] = [Infinity, 0];
  for (const value of values) {
    if (value < 0) return false;
    if (value > 0 && value < Infinity) { low = Math.min(low, value); high = Math.max(high, value); }
  }
  return high >= factor * low;
}

// A column: values, their text, and `at`, their places on an axis from `low` to `high` with ticks {at, text}.
function makeColumn(column, arrays) {
  if (column.words) {
    const codes = arrays[`words ${column.name}`];
    const ticks = column.words.map((text, i) => ({ at: -i, text: text || "–" }));
    return {
      ...column, values: codes, at: Float64Array.from(codes, (code) => -code), ticks, log: false, discrete: true,
      low: 0.5 - Math.max(ticks.length, 2), high: ticks.length > 1 ? 0.5 : 1, text: (i) => column.words[codes[i]] || "–",
    };
  }
  const values = arrays[`end ${column.name}`];
  const isLog = !isShare(column.name) && spans(values);
  const place = isLog ? log : (value) => value;
  let [low, high] = [Infinity, -Infinity];
  const different = new Set();
  for (const value of values) {
    const at = place(value);
    if (Number.isFinite(at)) { low = Math.min(low, at); high = Math.max(high, at); }
    if (different.size < 12) different.add(value);
  }
  if (low > high) [low, high] = [0, 1];
  const span = high - low || Math.abs(high) || 1;
  if (low === high) { low -= span / 2; high += span / 2; }
  // Zeros on a logarithmic axis, missing and infinite values have places of their own beyond the numbers'.
  const own = [["0", low - 0.09 * span], ["missing", low - 0.18 * span], ["∞", high + 0.09 * span]];
  const used = new Set();
  const at = Float64Array.from(values, (value) => {
    const found = place(value);
    if (Number.isFinite(found)) return found;
    const kind = value === Infinity ? 2 : Number.isNaN(value) || value === -Infinity ? 1 : 0;
    used.add(kind);
    return own[kind][1];
  });
  const [least, most] = [low, high];
  const finite = [...different].filter((value) => Number.isFinite(place(value)));
  const few = column.role === "setting" && different.size < 12;
  const ticks = few ? finite.sort((a, b) => a - b).map((value) => ({ at: place(value), text: setting(value) }))
    : roundTicks(low, high, isLog);
  ticks.push(...[...used].map((kind) => ({ at: own[kind][1], text: own[kind][0] })));
  const pad = 0.03 * span;
  const text = column.role === "setting" ? setting : isShare(column.name) ? percentage : number;
  return {
    ...column, values, at, ticks, least, most, log: isLog, discrete: few, text: (i) => text(values[i]),
    low: Math.min(low, ...ticks.map((t) => t.at)) - pad, high: Math.max(high, ...ticks.map((t) => t.at)) + pad,
  };
}

// Ticks at powers of ten, or at 1, 2 or 5 times one.
function roundTicks(low, high, isLog) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  if (isLog) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    ticks.push({ at: i * step, text: isLog ? power10(i * step) : setting(i * step) });
  }
  return ticks;
}

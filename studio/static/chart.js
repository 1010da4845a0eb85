// The curves of a run: faint as measured, bold smoothed. Checkpoints are ticks, restarts dashes.

const FORMATS = {
  learning_rate: (value) => value.toExponential(1).replace("e+0", ""),
  memory_bytes: (value) => `${(value / 1e9).toFixed(1)} GB`,
};

const HELD = "validation_loss"; // on images held back: drawn beside the loss

// Custom properties hold light-dark(…); only an element in place says which of both it is.
function colour(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export class Chart {
  constructor(box, controls) {
    Object.assign(this, { box, controls, plot: null, steps: [], values: {}, checkpoints: [], sessions: [], meanwhile: null });
    for (const control of Object.values(controls)) control.addEventListener("input", () => this.draw(true));
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(true));
  }

  size() {
    return { width: this.box.clientWidth, height: this.box.clientHeight };
  }

  // Takes all there is, as the server has summed it up; a restart may have taken steps back. What
  // is heard while the answer is on its way comes behind it.
  async load(address) {
    const meanwhile = (this.meanwhile = []);
    const answer = await fetch(address).catch(() => null);
    const told = answer?.ok ? await answer.json() : null;
    if (meanwhile !== this.meanwhile) return; // a later answer says more
    this.meanwhile = null;
    if (!told) return;
    this.steps = told.steps;
    this.sessions = told.sessions;
    this.values = Object.fromEntries(Object.entries(told.series).map(([name, columns]) => [name, columns.mean]));
    for (const line of meanwhile) this.add(line);
    this.draw(true);
  }

  // Takes one line of progress, or of the loss on images held back; what is known already is left
  // alone. That loss is told behind the progress of its step, which may have been left out.
  add(line) {
    this.meanwhile?.push(line);
    const held = line.type === "validation";
    const last = this.steps.at(-1) ?? -1;
    if (line.step < last || (line.step === last && !held)) return;
    if (line.step > last) this.steps.push(line.step);
    const at = this.steps.length - 1;
    const numbers = held ? { [HELD]: line.loss } : line;
    for (const name of [HELD, ...[...this.controls.series.options].map((option) => option.value)]) {
      this.values[name] ??= new Array(at).fill(null);
      this.values[name][at] = numbers[name] ?? this.values[name][at] ?? null;
    }
    this.draw(false);
  }

  draw(anew) {
    const name = this.controls.series.value;
    const raw = this.values[name];
    if (!raw || this.steps.length < 2) return;
    const weight = this.controls.smooth.value / 100;
    const data = [this.steps, raw, smoothed(raw, weight)];
    if (name === "loss") data.push(this.values[HELD] ?? new Array(this.steps.length).fill(null));
    if (this.plot && !anew) {
      this.plot.setData(data);
      return;
    }
    this.plot?.destroy();
    this.box.replaceChildren();
    this.plot = new uPlot(this.options(name, data), data, this.box);
  }

  options(name, data) {
    const [accent, soft, line] = ["accent", "soft", "line"].map(colour);
    const told = FORMATS[name] ?? ((value) => String(+value.toPrecision(3)));
    const font = `12px ${getComputedStyle(this.box).fontFamily}`;
    const axis = { stroke: soft, font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    const series = [
      {},
      { stroke: faint(accent), width: 1, points: { show: false } },
      { stroke: accent, width: 2.25, points: { show: false } },
    ];
    if (data.length > 3) series.push({ stroke: colour("warn"), width: 2, spanGaps: true, points: { show: true, size: 6 } });
    return {
      ...this.size(),
      series,
      legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: this.scale(data) },
      axes: [
        { ...axis, grid: { show: false }, size: 28 },
        { ...axis, size: 62, values: (_, values) => values.map((value) => (value === null ? "" : told(value))) },
      ],
      hooks: { draw: [(plot) => this.mark(plot, soft)], setCursor: [(plot) => this.tell(plot, told)] },
    };
  }

  scale(data) {
    if (this.controls.logarithmic.checked) return { distr: 3 };
    if (!this.controls.clip.checked) return {};
    const sorted = data[1].filter((value) => value !== null).sort((a, b) => a - b);
    const at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
    const held = (data[3] ?? []).filter((value) => value !== null);
    return { range: () => uPlot.rangeNum(Math.min(at(0.02), ...held), Math.max(at(0.98), ...held), 0.1, false) };
  }

  mark(plot, stroke) {
    const { ctx: pen, bbox: frame } = plot;
    pen.save();
    pen.strokeStyle = stroke;
    pen.lineWidth = devicePixelRatio;
    const upright = (step, top, dashes) => {
      const x = Math.round(plot.valToPos(step, "x", true));
      if (x < frame.left || x > frame.left + frame.width) return;
      pen.setLineDash(dashes);
      pen.beginPath();
      pen.moveTo(x, frame.top + top);
      pen.lineTo(x, frame.top + frame.height);
      pen.stroke();
    };
    for (const step of this.checkpoints) upright(step, frame.height - 8 * devicePixelRatio, []);
    for (const session of this.sessions.slice(1)) upright(session.from, 0, [4, 4]);
    pen.restore();
  }

  tell(plot, told) {
    this.bubble ??= Object.assign(document.createElement("p"), { className: "bubble" });
    const at = plot.cursor.idx;
    this.bubble.hidden = at === null || at === undefined;
    if (this.bubble.hidden) return;
    const [steps, raw, smooth, held] = plot.data;
    if (smooth[at] === null && !held?.[at]) return;
    const numbers = smooth[at] === null ? [] : [told(raw[at] ?? smooth[at]), `smoothed ${told(smooth[at])}`];
    if (held?.[at]) numbers.push(`held back ${told(held[at])}`);
    this.bubble.textContent = `Step ${steps[at].toLocaleString("en")}: ${numbers.join(", ")}`;
    if (this.bubble.parentElement !== this.box) this.box.append(this.bubble);
  }
}

function faint(colour) {
  return colour.replaceAll(",", " ").replace(/^rgb\((.*)\)$/, "rgb($1 / .35)");
}

// An exponential mean without the pull towards zero that it has at its begin.
function smoothed(values, weight) {
  let mean = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null) return mass ? mean / mass : null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

// Line charts over time, drawn by uPlot (MIT, see uplot-license.txt). Colours are read from the
// page's style sheet each time a chart is drawn, so that they follow light and dark.

const HEIGHT = 180;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axis(more) {
  return {
    stroke: () => colour("--muted"),
    grid: { stroke: () => colour("--border"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    ...more,
  };
}

const clock = (unix) => new Date(1000 * unix).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

function decades(_, least, most) {
  if (!(least > 0)) return [0.01, 1];
  return [10 ** Math.floor(Math.log10(least)), 10 ** Math.ceil(Math.log10(most * 1.001))];
}

/**
 * A chart in a figure, with a legend that has the latest values as text.
 *
 * @param {string} title what it shows
 * @param {{name: string, colour: string, dot: string, dash?: number[], fill?: boolean}[]} lines
 * @param {(value: number) => string} format writes a value
 * @param {boolean} log whether values of very different sizes are to be told apart
 */
export class Chart {
  constructor(title, lines, format, log = false) {
    this.lines = lines;
    this.format = format;
    this.log = log;
    this.span = [0, 1];
    this.figure = document.createElement("figure");
    this.figure.className = "card chart";
    const caption = document.createElement("figcaption");
    this.head = document.createElement("div");
    this.head.className = "head";
    const heading = document.createElement("h3");
    heading.textContent = title;
    this.head.append(heading);
    const legend = document.createElement("ul");
    legend.className = "legend";
    this.values = lines.map((line) => {
      const item = document.createElement("li");
      const dot = document.createElement("span");
      dot.className = `dot ${line.dot}`;
      const value = document.createElement("b");
      item.append(dot, `${line.name} `, value);
      legend.append(item);
      return value;
    });
    caption.append(this.head, legend);
    this.place = document.createElement("div");
    this.place.className = "plot";
    // The legend says in text what the lines show.
    this.place.setAttribute("aria-hidden", "true");
    this.figure.append(caption, this.place);
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(this.place);
  }

  options(width) {
    return {
      width,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { setScale: false } },
      scales: {
        x: { time: true, range: () => this.span },
        y: this.log ? { distr: 3, range: decades } : { range: (_, __, most) => [0, most > 0 ? 1.1 * most : 1] },
      },
      axes: [
        axis({ space: 70, values: (_, ticks) => ticks.map(clock) }),
        axis({ size: 66, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : this.format(tick))) }),
      ],
      series: [
        {},
        ...this.lines.map((line) => ({
          label: line.name,
          stroke: () => colour(line.colour),
          width: 1.75,
          dash: line.dash,
          points: { show: false },
          fill: line.fill ? () => `${colour(line.colour)}24` : undefined,
        })),
      ],
    };
  }

  resize() {
    const width = Math.floor(this.place.clientWidth);
    if (width > 0 && this.plot) this.plot.setSize({ width, height: HEIGHT });
  }

  /** Show columns: times in Unix seconds, then the values of each line; `null` is a gap. */
  show(columns, span) {
    this.span = span;
    const width = Math.floor(this.place.clientWidth);
    if (!this.plot) {
      if (width === 0) return;
      this.plot = new window.uPlot(this.options(width), columns, this.place);
    } else {
      this.plot.setData(columns);
    }
    this.lines.forEach((_, number) => {
      const latest = columns[number + 1].at(-1);
      this.values[number].textContent = latest === null || latest === undefined ? "–" : this.format(latest);
    });
  }

  redraw() {
    this.plot?.redraw(false);
  }
}

// Heat maps: a cell for each row and column.

// Colours that stay apart for the colour-blind and in grey (after cividis).
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

function mixed(first, second, share) {
  const part = (text, i) => parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
  return [0, 1, 2].map((i) => Math.round(part(first, i) + (part(second, i) - part(first, i)) * share));
}

const cssColour = (rgb) => `rgb(${rgb[0]},${rgb[1]},${rgb[2]})`;

/** Of a share in [0, 1]. */
function scaleColour(share) {
  const at = Math.min(1, Math.max(0, share)) * (CIVIDIS.length - 1), i = Math.min(CIVIDIS.length - 2, Math.floor(at));
  return mixed(CIVIDIS[i], CIVIDIS[i + 1], at - i);
}

/** Of a load over the even share: the middle at 1, the ends at a quarter and at four times it. */
function loadColour(load) {
  const colour = theme(), turned = Math.max(-1, Math.min(1, Math.log2(Math.max(load, 1e-3)) / 2));
  return turned < 0 ? mixed(colour.mid, colour.low, -turned) : mixed(colour.mid, colour.high, turned);
}

const inkOn = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#111" : "#fff");

class HeatMap {
  /** options: rows, columns, value(row, column), colour(value), rowName, columnName, text(value), tell(row, column), xUnit, yUnit, run */
  constructor(canvas, options) {
    Object.assign(this, { canvas, numbers: false }, options);
    this.seen = this.fresh = false;
    register(this);
  }

  draw() {
    this.fresh = true;
    const { pen, width, height } = prepareCanvas(this.canvas), colour = theme();
    const names = Array.from({ length: this.rows }, (_, row) => this.rowName(row));
    const margin = 10 + (this.yUnit ? 14 : 0) + Math.max(14, ...names.map((text) => pen.measureText(text).width));
    this.box = { left: margin, right: width - 8, top: 6, bottom: height - 34 };
    const wide = (this.box.right - this.box.left) / this.columns, tall = (this.box.bottom - this.box.top) / this.rows;
    Object.assign(this, { wide, tall });
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (let row = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++) this.drawCell(pen, row, column);
    }
    this.drawNames(pen, colour, names);
    if (this.at) {
      pen.strokeStyle = colour.ink;
      pen.lineWidth = 1.5;
      pen.strokeRect(this.box.left + this.at[1] * wide, this.box.top + this.at[0] * tall, Math.max(wide, 2), tall);
    }
  }

  drawCell(pen, row, column) {
    const value = this.value(row, column), x = this.box.left + column * this.wide, y = this.box.top + row * this.tall;
    if (!known(value)) return;
    const gap = this.wide > 14 && this.tall > 12 ? 1 : 0;
    const rgb = this.colour(value);
    pen.fillStyle = cssColour(rgb);
    const right = Math.round(x + this.wide), bottom = Math.round(y + this.tall);
    pen.fillRect(Math.round(x), Math.round(y), Math.max(1, right - Math.round(x) - gap), Math.max(1, bottom - Math.round(y) - gap));
    if (!this.numbers) return;
    const text = this.text(value);
    if (pen.measureText(text).width < this.wide - 4 && this.tall > 13) {
      pen.fillStyle = inkOn(rgb);
      pen.fillText(text, x + this.wide / 2, y + this.tall / 2);
    }
  }

  drawNames(pen, colour, names) {
    const { left, right, top, bottom } = this.box;
    pen.fillStyle = colour.soft;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const every = Math.ceil(13 / this.tall);
    for (let row = 0; row < this.rows; row += every) pen.fillText(names[row], left - 5, top + (row + 0.5) * this.tall);
    pen.textBaseline = "top";
    pen.textAlign = "center";
    let free = -Infinity;
    for (let column = 0; column < this.columns; column++) {
      const text = this.columnName(column), half = pen.measureText(text).width / 2, x = left + (column + 0.5) * this.wide;
      if (x - half < Math.max(free + 10, left - 6) || x + half > right + 7) continue;
      pen.fillText(text, x, bottom + 5);
      free = x + half;
    }
    pen.textAlign = "right";
    pen.fillText(this.xUnit, right, bottom + 19);
    if (!this.yUnit) return;
    pen.save();
    pen.translate(3, (top + bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(this.yUnit, 0, 0);
    pen.restore();
  }

  cellAt(x, y) {
    const column = Math.floor((x - this.box.left) / this.wide), row = Math.floor((y - this.box.top) / this.tall);
    return row >= 0 && row < this.rows && column >= 0 && column < this.columns ? [row, column] : null;
  }
}

/** Let pointer and arrow keys choose a cell, whose figures stand in the read-out. */
function listenToCells(map, readout) {
  const show = (cell) => {
    map.at = cell;
    readout.textContent = cell ? map.tell(cell[0], cell[1]) : map.hint;
    redraw();
  };
  map.canvas.addEventListener("pointermove", (event) => {
    const box = map.canvas.getBoundingClientRect();
    if (map.box) show(map.cellAt(event.clientX - box.left, event.clientY - box.top));
  });
  map.canvas.addEventListener("pointerleave", () => show(null));
  map.canvas.addEventListener("blur", () => show(null));
  map.canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [row, column] = map.at || [0, -move[1]];
    show([Math.min(map.rows - 1, Math.max(0, row + move[0])), Math.min(map.columns - 1, Math.max(0, column + move[1]))]);
  });
  map.refresh = () => show(null);
  show(null);
}

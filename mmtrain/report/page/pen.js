// Small strokes that all drawings share.

function line(pen, x, y, toX, toY) {
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(toX, toY);
  pen.stroke();
}

function dot(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 7);
  pen.fill();
}

/** Skipped steps are crosses, rollbacks arrows back, restarts triangles, layouts squares: not told by colour alone. */
function drawGlyph(pen, kind, x, y) {
  pen.lineWidth = 1.6;
  pen.beginPath();
  if (kind === "skipped") {
    pen.moveTo(x - 3.5, y - 3.5); pen.lineTo(x + 3.5, y + 3.5);
    pen.moveTo(x + 3.5, y - 3.5); pen.lineTo(x - 3.5, y + 3.5);
    pen.stroke();
  } else if (kind === "rollback") {
    pen.moveTo(x + 4, y - 4.5); pen.lineTo(x - 4, y); pen.lineTo(x + 4, y + 4.5);
    pen.closePath();
    pen.fill();
  } else if (kind === "restart") {
    pen.moveTo(x, y - 5); pen.lineTo(x + 4.5, y + 3.5); pen.lineTo(x - 4.5, y + 3.5);
    pen.closePath();
    pen.fill();
  } else {
    pen.fillRect(x - 3, y - 3, 6, 6);
  }
}

/** First index whose value is not below `wanted`. */
function lowerBound(values, wanted) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low;
}

/** Stretches [from, to) of values that are all known. */
function pieces(values, from, to) {
  const found = [];
  let begin = null;
  for (let i = from; i <= to; i++) {
    const there = i < to && Number.isFinite(values[i]);
    if (there && begin === null) begin = i;
    if (!there && begin !== null) { found.push([begin, i]); begin = null; }
  }
  return found;
}

/** A text cut so that it fits into a width; nothing where not even some letters do. */
function fitted(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  for (let end = text.length - 1; end >= 3; end--) {
    if (pen.measureText(`${text.slice(0, end)}…`).width <= width) return `${text.slice(0, end)}…`;
  }
  return "";
}

/** Where the phases of a run lie on the axis at work. */
function phaseEdges(run) {
  const level = run.curves.levels[0], places = (level.places = level.places || unpackPlaces(level));
  const hourAt = (step) => places.hours[Math.min(places.hours.length - 1, lowerBound(places.step, step))];
  return run.phases.map((phase) => {
    const ends = {
      step: [phase.first_step - 0.5, phase.last_step + 0.5],
      tokens: [phase.first_tokens, phase.first_tokens + phase.tokens],
      hours: [hourAt(phase.first_step - 1), hourAt(phase.last_step)],
    }[state.axis];
    return { name: phase.name || lengthText(phase.seq_len), from: ends[0], to: ends[1] };
  });
}

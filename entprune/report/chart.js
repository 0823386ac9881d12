// Draws what the page holds as JSON into its <figure data-chart> elements, in the size that they have on the screen.
// Marks differ in shape as well as in colour; each can be reached with the keyboard and tells its figures.
"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const SHAPES = {
    circle: r => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
    cross: r => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
    diamond: r => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0Z`,
    triangle: r => `M0,${-1.2 * r}L${1.15 * r},${0.9 * r}L${-1.15 * r},${0.9 * r}Z`,
    star: r => "M" + Array.from({ length: 10 }, (_, n) => {
      const size = n % 2 ? 0.55 * r : 1.4 * r, angle = Math.PI * (n / 5 - 0.5);
      return `${(size * Math.cos(angle)).toFixed(2)},${(size * Math.sin(angle)).toFixed(2)}`;
    }).join("L") + "Z",
  };

  function node(parent, name, attributes, text) {
    const made = document.createElementNS(NS, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  }

  function element(parent, name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  }

  function short(value) {
    const size = Math.abs(value), text = +value.toPrecision(3);
    if (size >= 1e9) return +(value / 1e9).toPrecision(3) + " G";
    if (size >= 1e6) return +(value / 1e6).toPrecision(3) + " M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(3) + " k";
    return String(Object.is(text, -0) ? 0 : text).replace("-", "−");
  }

  function linearTicks(low, high, most) {
    const raw = (high - low) / Math.max(most, 2), power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = power * [1, 2, 5, 10].find(factor => factor * power >= raw * 0.999);
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, n) => (first + n) * step);
  }

  function logTicks(low, high, most) {
    let found = [];
    for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
      const next = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const factor of factors) next.push(factor * Math.pow(10, power));
      const inside = next.filter(tick => tick >= low && tick <= high);
      if (found.length > 1 && inside.length > most) break;
      found = inside;
    }
    return found;
  }

  function scaleOf(values, pixels, { log, least, greatest, pad }) {
    let low = Math.min(...values), high = Math.max(...values);
    if (least !== undefined) low = Math.min(low, least);
    if (greatest !== undefined) high = Math.max(high, greatest);
    const turn = log ? Math.log : value => value, back = log ? Math.exp : value => value;
    let [a, b] = [turn(low), turn(high)];
    const margin = (b - a || Math.abs(b) || 1) * pad;
    [a, b] = [a - margin, b + margin];
    const place = value => pixels[0] + (pixels[1] - pixels[0]) * (turn(value) - a) / (b - a);
    place.low = back(a);
    place.high = back(b);
    return place;
  }

  // A box beside a mark: by mouse, by touch and by keyboard.
  function tellers(place) {
    const tip = element(place, "div", "tip");
    tip.setAttribute("role", "status");
    const hide = () => { tip.style.visibility = "hidden"; };
    hide();
    return (mark, lines) => {
      const show = () => {
        tip.replaceChildren();
        lines.forEach((line, number) => element(tip, number ? "div" : "strong", "", line));
        const box = place.getBoundingClientRect(), at = mark.getBoundingClientRect();
        tip.style.left = Math.max(0, Math.min(at.left - box.left + 12, box.width - tip.offsetWidth)) + "px";
        const above = at.top - box.top - tip.offsetHeight - 8;
        tip.style.top = (above >= 0 ? above : at.bottom - box.top + 8) + "px";
        tip.style.visibility = "visible";
      };
      for (const event of ["mouseenter", "focus", "click"]) mark.addEventListener(event, show);
      for (const event of ["mouseleave", "blur"]) mark.addEventListener(event, hide);
    };
  }

  function frame(place, height, label) {
    place.replaceChildren();
    const tell = tellers(place), width = Math.max(place.clientWidth, 220);
    const svg = node(place, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label });
    return { svg, tell, width };
  }

  function legend(figure, kinds, present) {
    const list = figure.querySelector(".legend");
    list.replaceChildren();
    for (const kind of present) {
      const entry = element(list, "span");
      const svg = node(entry, "svg", { width: 18, height: 18, viewBox: "-9 -9 18 18", "aria-hidden": "true" });
      node(svg, "path", { d: SHAPES[kinds[kind].shape](kinds[kind].shape === "star" ? 6.5 : 5), class: `key ${kind}` });
      entry.append(kinds[kind].label);
    }
  }

  // --- marks in a plane ---------------------------------------------------------------------------------------------

  function scatter(figure, data) {
    const place = figure.querySelector(".plot"), chosen = figure.querySelector("input:checked");
    const axis = chosen ? chosen.value : Object.keys(data.axes)[0], { title, log } = data.axes[axis];
    const points = data.points.filter(point => point.x[axis] !== null && point.x[axis] !== undefined && point.y !== null);
    const height = Math.round(Math.min(430, Math.max(300, 0.62 * place.clientWidth)));
    const { svg, tell, width } = frame(place, height, `${data.y} against ${title}: ${points.length} marks`);
    const order = Object.keys(data.kinds);
    legend(figure, data.kinds, order.filter(kind => points.some(point => point.kind === kind)));
    if (!points.length) {
      node(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing is known here");
      return;
    }
    const L = 52, R = 20, T = 26, B = 46, top = data.top ?? Infinity;
    const capped = value => Math.min(value, top);
    const lines = data.guides.filter(guide => guide.y !== undefined || guide.x[axis] !== undefined);
    const heights = points.flatMap(point => [capped(point.y), ...(point.bound === null ? [] : [capped(point.bound)])]);
    heights.push(...lines.flatMap(guide => guide.y === undefined ? [] : [guide.y]));
    const wide = points.map(point => point.x[axis]);
    wide.push(...lines.flatMap(guide => guide.y === undefined ? [guide.x[axis]] : []));
    const y = scaleOf(heights, [height - B, T], { least: 0, pad: 0.07 });
    const x = scaleOf(wide, [L, width - R], { log: log && Math.min(...wide) > 0, pad: 0.06 });
    const most = Math.max(3, Math.floor(width / 75));
    for (const at of (log ? logTicks : linearTicks)(x.low, x.high, most)) {
      node(svg, "line", { class: "grid", x1: x(at), x2: x(at), y1: T, y2: height - B });
      node(svg, "text", { x: x(at), y: height - B + 16, "text-anchor": "middle" }, short(at));
    }
    for (const at of linearTicks(y.low, y.high, 6)) {
      node(svg, "line", { class: "grid", x1: L, x2: width - R, y1: y(at), y2: y(at) });
      node(svg, "text", { x: L - 7, y: y(at) + 4, "text-anchor": "end" }, short(at));
    }
    node(svg, "text", { x: (L + width - R) / 2, y: height - 10, "text-anchor": "middle", class: "title" }, title);
    node(svg, "text", { x: 4, y: 14, class: "title" }, data.y);
    for (const guide of lines) {
      const flat = guide.y !== undefined, at = flat ? y(guide.y) : x(guide.x[axis]);
      node(svg, "line", flat ? { class: "guide", x1: L, x2: width - R, y1: at, y2: at }
        : { class: "guide", x1: at, x2: at, y1: T, y2: height - B });
      const beside = at > width / 2;
      node(svg, "text", flat ? { x: width - R, y: at - 5, "text-anchor": "end", class: "halo" }
        : { x: at + (beside ? -5 : 5), y: T + 12, "text-anchor": beside ? "end" : "start", class: "halo" }, guide.text);
    }
    const front = (data.fronts?.[axis] ?? []).filter(step => step.drop <= top);
    if (front.length > 1)
      node(svg, "polyline", { class: "front", points: front.map(step => `${x(step.cost)},${y(step.drop)}`).join(" ") });
    for (const kind of order)
      for (const point of points.filter(point => point.kind === kind)) {
        const at = [x(point.x[axis]), y(capped(point.y))], over = point.y > top;
        if (!over && point.bound !== null) {
          const end = y(capped(point.bound));
          node(svg, "path", { class: `bound ${kind}`, d: `M${at[0]},${at[1]}V${end}m-4,0h8` });
        }
        const size = data.kinds[kind].size;
        const mark = node(svg, "path", {
          class: `mark ${kind}`, d: SHAPES[data.kinds[kind].shape](size), transform: `translate(${at[0]},${at[1]})`,
          tabindex: 0, role: "img", "aria-label": point.lines.join(", "),
        });
        tell(mark, point.lines);
        if (over && !data.kinds[kind].quiet) {
          const text = `↑ ${short(point.y)}`, edge = at[0] > width - 60;
          node(svg, "text", { x: at[0], y: at[1] + 20, "text-anchor": edge ? "end" : "middle", class: "halo" }, text);
        } else if (!over && point.label) {
          const edge = at[0] > width - 40;
          node(svg, "text", { x: at[0] + (edge ? -9 : 9), y: at[1] - 7, "text-anchor": edge ? "end" : "start",
            class: "halo label" }, point.label);
        }
      }
  }

  // --- channel probabilities of one group ---------------------------------------------------------------------------

  function bars(figure, data) {
    const select = figure.querySelector("select"), place = figure.querySelector(".plot");
    if (!select.options.length) {
      data.groups.forEach((group, number) => {
        const option = element(select, "option", "", `${group.name}: ${group.kept} of ${group.channels} kept`);
        option.value = number;
      });
    }
    const number = Number(select.value), group = data.groups[number];
    for (const other of document.querySelectorAll("[data-group]"))
      other.hidden = Number(other.dataset.group) !== group.number;
    const height = 260, L = 52, R = 8, T = 26, B = 40;
    const { svg, tell, width } = frame(place, height, `Channel probabilities of ${group.name}`);
    const pattern = node(node(svg, "defs", {}), "pattern", { id: "hatch", width: 5, height: 5,
      patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    node(pattern, "line", { class: "hatching", x1: 0, x2: 0, y1: 0, y2: 5 });
    const highest = Math.max(...group.bars.map(bar => bar[1]), 1e-9);
    const y = scaleOf([0, highest], [height - B, T], { least: 0, pad: 0 });
    const step = (width - L - R) / group.bars.length, gap = step > 6 ? 2 : step > 3 ? 1 : 0;
    for (const at of linearTicks(0, highest, 4)) {
      node(svg, "line", { class: "grid", x1: L, x2: width - R, y1: y(at), y2: y(at) });
      node(svg, "text", { x: L - 7, y: y(at) + 4, "text-anchor": "end" }, short(at));
    }
    group.bars.forEach(([channel, probability, isKept], rank) => {
      const tall = Math.max(2, y(0) - y(probability));
      const mark = node(svg, "rect", {
        class: isKept ? "bar is-kept" : "bar is-removed", x: L + rank * step, width: Math.max(step - gap, 0.8),
        y: y(0) - tall, height: tall, tabindex: rank === 0 ? 0 : -1,
      });
      tell(mark, [`channel ${channel}`, `w = ${short(probability)}`, isKept ? "kept" : "removed"]);
    });
    for (const at of linearTicks(1, group.bars.length, Math.floor(width / 60)).filter(at => at >= 1 && at % 1 === 0))
      node(svg, "text", { x: L + (at - 0.5) * step, y: height - B + 16, "text-anchor": "middle" }, String(at));
    const where = L + Math.min(group.effective, group.bars.length) * step, late = where > 0.6 * width;
    node(svg, "line", { class: "guide", x1: where, x2: where, y1: T, y2: height - B });
    node(svg, "text", { x: where + (late ? -5 : 5), y: T + 10, "text-anchor": late ? "end" : "start", class: "halo" },
      `${short(group.effective)} effective`);
    node(svg, "text", { x: 4, y: 14, class: "title" }, "probability w");
    node(svg, "text", { x: (L + width - R) / 2, y: height - 8, "text-anchor": "middle", class: "title" },
      "channel, most important first");
    figure.querySelector(".said").textContent = group.text;
  }

  const draw = { scatter, bars };
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const data = JSON.parse(document.getElementById(figure.dataset.source).textContent);
    const again = () => draw[figure.dataset.chart](figure, data);
    again();
    for (const control of figure.querySelectorAll("input, select")) control.addEventListener("change", again);
    let width = figure.clientWidth;
    new ResizeObserver(() => {
      if (figure.clientWidth !== width) { width = figure.clientWidth; again(); }
    }).observe(figure);
  }
})();

// The board: a column for each latent frame, with its picture, its multiplier m, its delay d, and its noise levels.
// props.value: { m, d, taus, thumbnails, files, free }; what a person changes is written there and told by "input".
const board = element.querySelector(".board");
const F = props.value.m.length;
const frames = [...Array(F).keys()];
const cells = (row) => frames.map((i) => `<td data-i="${i}">${row(i)}</td>`).join("");

board.innerHTML = `<table>
  <tr><th>frame</th>${frames.map((i) => `<th>${i}</th>`).join("")}</tr>
  <tr class="pictures"><th title="drop a picture on a frame, or press it">given</th>${cells((i) =>
    `<label><input type="file" accept="image/*" aria-label="picture of frame ${i}"></label><button aria-label="no picture on frame ${i}">×</button>`)}</tr>
  <tr><th title="multiplier: 0 is given and clean, 1 is free">m</th>${cells((i) =>
    `<input class="m" type="number" min="0" max="1" step="0.1" aria-label="multiplier of frame ${i}">`)}</tr>
  <tr><th title="delay: the share of the run that a frame waits">d</th>${cells((i) =>
    `<input class="d" type="number" min="0" max="0.9" step="0.1" aria-label="delay of frame ${i}">`)}</tr>
  <tbody class="taus"></tbody></table>`;

const inputs = (name) => [...board.querySelectorAll("input." + name)];
const numbers = (name) => inputs(name).map((input) => (input.value === "" ? null : Number(input.value)));
const tell = (change) => {
  props.value = { ...props.value, m: numbers("m"), d: numbers("d"), dropped: false, ...change };
  trigger("input");
};
const colour = (tau) => {
  const [data, middle, noise] = props.colours;
  const [from, to, share] = tau < 0.5 ? [data, middle, 2 * tau] : [middle, noise, 2 * tau - 1];
  return `background: color-mix(in srgb, ${to} ${100 * share}%, ${from}); color: ${tau > 0.4 ? "white" : "#333"}`;
};

function draw() {
  const { taus, thumbnails, files, free } = props.value;
  for (const name of ["m", "d"]) {
    inputs(name).forEach((input, i) => {
      input.disabled = free;
      if (input !== document.activeElement) input.value = +props.value[name][i].toFixed(4);
    });
  }
  board.querySelectorAll(".pictures td").forEach((cell, i) => {
    cell.className = (thumbnails[i] ? "given" : "") + (files[i] ? " dropped" : "");
    cell.querySelector("label").style.backgroundImage = thumbnails[i] ? `url("${thumbnails[i]}")` : "none";
  });
  board.classList.toggle("free", free);
  board.querySelector(".taus").innerHTML = taus.map((row, k) =>
    `<tr><th>${k ? "" : "step "}${k}</th>${cells((i) => (row[i] ? row[i].toFixed(2).replace(/^0/, "") : "0"))}</tr>`).join("");
  board.querySelectorAll(".taus td").forEach((cell, n) => {
    cell.dataset.k = Math.floor(n / F);
    cell.style = colour(taus[cell.dataset.k][n % F]);
  });
}

async function put(i, file) {
  const files = [...props.value.files];
  files[i] = file ? (await upload(file)).path : "";
  tell({ files, dropped: true });
}

board.addEventListener("input", (event) => {
  if (event.target.type === "number") tell({});
});
board.addEventListener("change", (event) => {
  const [file] = event.target.files ?? [];
  if (!file) return;
  put(+event.target.closest("td").dataset.i, file);
  event.target.value = ""; // so that the same file can be chosen again
});
board.addEventListener("click", (event) => {
  if (event.target.tagName === "BUTTON") put(+event.target.closest("td").dataset.i, null);
});
board.addEventListener("dragover", (event) => event.target.closest(".pictures td") && event.preventDefault());
board.addEventListener("drop", (event) => {
  const cell = event.target.closest(".pictures td");
  if (!cell || !event.dataTransfer.files.length) return;
  event.preventDefault();
  put(+cell.dataset.i, event.dataTransfer.files[0]);
});

// Any table: press a cell and draw; what was drawn is told when the pointer is lifted.
let painted = null;
const paint = (cell) => {
  if (!painted || !cell) return;
  painted[cell.dataset.k][cell.dataset.i] = props.brush;
  cell.style = colour(props.brush);
  cell.textContent = props.brush.toFixed(2).replace(/^0/, "");
};
board.addEventListener("pointerdown", (event) => {
  const cell = event.target.closest(".free .taus td");
  if (!cell) return;
  event.preventDefault();
  painted = props.value.taus.map((row) => [...row]);
  paint(cell);
});
board.addEventListener("pointermove", (event) => {
  if (painted) paint(document.elementFromPoint(event.clientX, event.clientY)?.closest(".free .taus td"));
});
window.addEventListener("pointerup", () => {
  if (painted) tell({ taus: painted });
  painted = null;
});

watch("value", draw);
draw();

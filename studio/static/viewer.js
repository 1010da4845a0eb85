// Shows one picture of a grid large. Arrows walk through the grid, space flips to where one began.

const dialog = document.getElementById("viewer");
const picture = document.getElementById("viewer-picture");
const told = document.getElementById("viewer-told");
const save = document.getElementById("viewer-open");

let grid = []; // rows of links
let place = [0, 0];
let first = null;

export function view(rows, link) {
  grid = rows;
  place = placeOf(link);
  first = link;
  show(link);
  dialog.showModal();
}

// Lets the pictures of an element open here; `rowsOf` lists its links, a list per row.
export function opensFrom(element, rowsOf) {
  element?.addEventListener("click", (event) => {
    const link = event.target.closest("a:has(img)");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    view(rowsOf(), link);
  });
}

export function rowsOfTable(table) {
  const rows = [...table.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("a:has(img)")]);
  return rows.filter((row) => row.length);
}

function placeOf(link) {
  const row = grid.findIndex((each) => each.includes(link));
  return row < 0 ? [0, 0] : [row, grid[row].indexOf(link)];
}

function show(link) {
  picture.src = link.href;
  picture.alt = link.querySelector("img").alt;
  told.textContent = link.dataset.told;
  save.href = link.href;
}

function walk(down, right) {
  const row = Math.min(Math.max(place[0] + down, 0), grid.length - 1);
  const column = Math.min(Math.max(place[1] + right, 0), grid[row].length - 1);
  place = [row, column];
  show(grid[row][column]);
}

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

dialog?.addEventListener("keydown", (event) => {
  if (MOVES[event.key]) {
    event.preventDefault();
    walk(...MOVES[event.key]);
  } else if (event.key === " " && first && !event.target.closest("button, a")) {
    event.preventDefault();
    show(first);
  }
});
dialog?.addEventListener("keyup", (event) => {
  if (event.key === " " && !event.target.closest("button, a")) show(grid[place[0]][place[1]]);
});
dialog?.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog?.addEventListener("close", () => grid[place[0]]?.[place[1]]?.focus());

"use strict";
// Cards that have every word that was typed stay; sites with none close until the field is empty again.
const field = document.getElementById("find"), said = document.getElementById("found");
const sites = [...document.querySelectorAll("details.site")];
const texts = new Map([...document.querySelectorAll(".card")].map((card) => [card, card.textContent.toLowerCase()]));
const before = new Map();  // whether sites were open when the search began
// A whole number is a component's: cards are full of others.
function has(card, word) {
  return /^\d+$/.test(word) ? card.dataset.number === word : texts.get(card).includes(word);
}
function find() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length && !before.size) sites.forEach((site) => before.set(site, site.open));
  let n = 0;
  for (const site of sites) {
    let here = 0;
    for (const card of site.querySelectorAll(".card")) {
      card.hidden = !words.every((word) => has(card, word));
      here += card.hidden ? 0 : 1;
    }
    site.open = words.length ? here > 0 : before.get(site) ?? site.open;
    n += here;
  }
  if (!words.length) before.clear();
  said.textContent = words.length ? `${n} of ${texts.size} cards` : "";
}
// A link into a closed or filtered part shows where it leads; cards are often higher than a window.
function follow() {
  const card = document.getElementById(location.hash.slice(1));
  if (!texts.has(card)) return;
  if (card.hidden) { field.value = ""; find(); }
  card.closest("details").open = true;
  card.scrollIntoView();
  card.focus({ preventScroll: true });
}
field.addEventListener("input", find);
addEventListener("hashchange", follow);
follow();
document.body.dataset.drawn = "yes";

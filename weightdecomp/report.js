"use strict";
// Cards whose text has every word that was typed stay; sites with none close.
const field = document.getElementById("find"), said = document.getElementById("found");
const sites = [...document.querySelectorAll("details.site")];
const texts = new Map([...document.querySelectorAll(".card")].map((card) => [card, card.textContent.toLowerCase()]));
function find() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let n = 0;
  for (const site of sites) {
    let here = 0;
    for (const card of site.querySelectorAll(".card")) {
      card.hidden = !words.every((word) => texts.get(card).includes(word));
      here += card.hidden ? 0 : 1;
    }
    if (words.length) site.open = here > 0;
    n += here;
  }
  said.textContent = words.length ? `${n} of ${texts.size} cards` : "";
}
// A link into a closed or filtered part shows where it leads.
function follow() {
  const card = location.hash && document.getElementById(location.hash.slice(1));
  if (!card) return;
  if (card.hidden) { field.value = ""; find(); }
  card.closest("details").open = true;
  card.scrollIntoView({ block: "center" });
  card.focus({ preventScroll: true });
}
field.addEventListener("input", find);
addEventListener("hashchange", follow);
follow();
document.body.dataset.drawn = "yes";

// Loads the parts of a page that change anew every few seconds, while somebody looks at it.
//
// An element with `data-live` names the address. What comes from there has the same elements with
// `data-part` as the page, and replaces their content.

const EVERY_MS = 3000;

for (const page of document.querySelectorAll("[data-live]")) follow(page);

function follow(page) {
  const shown = new Map();
  const look = async () => {
    if (document.hidden) return;
    try {
      const answer = await fetch(page.dataset.live);
      if (answer.ok) update(page, shown, await answer.text());
    } catch {
      // The server is away for a moment. What is shown stays, and the next look may succeed.
    }
  };
  setInterval(look, EVERY_MS);
  document.addEventListener("visibilitychange", look);
}

function update(page, shown, text) {
  const parsed = new DOMParser().parseFromString(text, "text/html");
  for (const part of parsed.querySelectorAll("[data-part]")) {
    const { part: name } = part.dataset;
    const markup = part.innerHTML;
    if (markup === shown.get(name)) continue;
    shown.set(name, markup);
    replace(page.querySelector(`[data-part="${name}"]`), part);
  }
}

// A link that has the focus keeps it.
function replace(old, part) {
  const { activeElement } = document;
  const focused = old.contains(activeElement) && activeElement.getAttribute("href");
  old.replaceChildren(...part.childNodes);
  if (focused) old.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

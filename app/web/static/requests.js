// The ready requests: the address as the browser sees it, the tier that is chosen, and copying.

for (const part of document.querySelectorAll('[data-fill="origin"]')) {
  part.textContent = location.origin;
}

document.addEventListener("change", ({ target }) => {
  if (target.name !== "tier") return;
  for (const part of document.querySelectorAll('[data-fill="tier"]')) part.textContent = target.value;
});

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.copy);
    button.textContent = (await copied(code)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

// Browsers offer the clipboard to pages on https and on this machine only. Elsewhere the request
// is selected, so that the keys for copying work.
async function copied(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return false;
  }
}

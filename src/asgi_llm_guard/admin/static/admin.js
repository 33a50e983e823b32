// Makes the pages livelier; everything works without it.
"use strict";

// A form that cannot be taken back asks first.
document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});

// Copy a key that is shown once.
for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      const range = document.createRange();
      range.selectNodeContents(source);
      const selection = window.getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      button.textContent = "Marked: press Ctrl+C";
    }
  });
}

// Parts that are alive are fetched again, unless somebody is using them or is not looking.
const live = document.querySelector("[data-live]");
if (live) {
  const every = Number(live.dataset.live) * 1000;
  const busy = () =>
    document.hidden || live.contains(document.activeElement) || live.querySelector("details[open]") !== null;
  const refresh = async () => {
    if (!busy()) {
      try {
        const answer = await fetch(location.href, { redirect: "manual", headers: { "x-refresh": "1" } });
        if (answer.ok) {
          const page = new DOMParser().parseFromString(await answer.text(), "text/html");
          const fresh = page.getElementById(live.id);
          if (fresh && !busy()) live.replaceChildren(...fresh.childNodes);
        } else if (answer.type === "opaqueredirect") {
          location.reload();
          return;
        }
      } catch {
        // The service is away; the next turn tries again.
      }
    }
    window.setTimeout(refresh, every);
  };
  window.setTimeout(refresh, every);
}

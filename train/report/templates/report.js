
"use strict";
// The slider of a split: show the kept patches and the answer at one selection ratio.
for (const slider of document.querySelectorAll("input[data-split]")) {
  const section = slider.closest("[data-examples]");
  const labels = JSON.parse(slider.dataset.labels);
  const show = () => {
    const label = labels[Number(slider.value)];
    slider.closest(".control").querySelector("output").textContent = label;
    slider.setAttribute("aria-valuetext", "ratio " + label);
    for (const part of section.querySelectorAll("[data-ratio]")) {
      part.classList.toggle("off", part.dataset.ratio !== label);
    }
  };
  slider.addEventListener("input", show);
  slider.closest(".control").hidden = false;
  show();
}
// Hide the overlays to see the plain frames.
for (const box of document.querySelectorAll("input[data-plain]")) {
  const section = box.closest("[data-examples]");
  box.closest(".control").hidden = false;
  box.addEventListener("change", () => section.classList.toggle("plain", box.checked));
}

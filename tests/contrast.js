// Texts of a page that stand out from their ground by less than 4.5 to 1 (WCAG 2.1, 1.4.3): what they are, and the ratio.
() => {
  const channel = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const colour = (text) => { const c = text.match(/[\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c; };
  const over = (top, ground) => [0, 1, 2].map((i) => top[i] * top[3] + ground[i] * (1 - top[3]));
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const faint = {};
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const words = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (!words || style.visibility === "hidden" || style.display === "none" || !box.width || !box.height) continue;
    if (element.closest("svg") && element.style.fill) continue;  // on a bar, whose colour it was chosen for
    let ground = dark ? [18, 18, 18] : [255, 255, 255], opacity = 1;
    const around = [];
    for (let one = element; one; one = one.parentElement) around.unshift(getComputedStyle(one));
    for (const one of around) { ground = over(colour(one.backgroundColor), ground); opacity *= one.opacity; }
    const ink = colour(element.closest("svg") ? style.fill : style.color);
    ink[3] *= opacity;
    const [a, b] = [luminance(over(ink, ground)), luminance(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint[`${element.tagName} ${element.className} ${ratio.toFixed(2)}`] = words.slice(0, 60);
  }
  return faint;
}

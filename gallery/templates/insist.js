// Gradio forgets clicks while one is answered: the last one is told again until its person is open.
let timer;
const insist = (button, tries) => {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const open = document.querySelector('#person h2')?.dataset.of;
    if (!tries || open === button.dataset.id || !button.isConnected) return;
    if (open) trigger('select', {...button.dataset});
    insist(button, tries - 1);
  }, 400);
};
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) insist(button, 20);
});

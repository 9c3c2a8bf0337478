// The button of the words that were chosen keeps the focus when the map comes. A map that comes when
// another person is open is replaced by that person's.
let chosen = false;
const panel = element.closest('#person');
element.addEventListener('click', event => { if (event.target.closest('button')) chosen = true; });
watch('value', () => {
  if (chosen && !element.querySelector('.waiting')) {
    element.querySelector('[aria-pressed=true]')?.focus({preventScroll: true});
    chosen = false;
  }
  const [head, heat] = ['h2', '.pair'].map(part => panel.querySelector(part)?.dataset.of);
  if (head && heat && head !== heat) trigger('select', {words: '0'});
});

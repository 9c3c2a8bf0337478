// A person who is opened gets the focus; who is closed, by the button or by Escape, gives it back.
// The panel takes its place after this is told; then a phone scrolls to it, and where it is beside
// the hits, which now have fewer columns, its own hit stays in sight.
const narrow = matchMedia('(max-width: 48rem)');
const focus = () => {
  const heading = element.querySelector('h2');
  heading?.focus({preventScroll: true});
  setTimeout(() => {
    if (narrow.matches) heading?.scrollIntoView({block: 'start'});
    else document.querySelector('#hits [aria-current]')?.scrollIntoView({block: 'nearest'});
  }, 50);
};
const close = () => {
  trigger('select', {do: 'close'});
  document.querySelector('#hits [aria-current]')?.focus();
};
watch('value', focus);
focus();
element.addEventListener('click', event => { if (event.target.closest('button')) close(); });
element.closest('#person').addEventListener('keydown', event => {
  if (event.key === 'Escape') close();
});

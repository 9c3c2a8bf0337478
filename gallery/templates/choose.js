// A click on a button tells the server what the button says in its data.
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.id) {
    element.querySelector('[aria-current]')?.removeAttribute('aria-current');
    button.setAttribute('aria-current', 'true');
  }
  trigger('select', {...button.dataset});
});

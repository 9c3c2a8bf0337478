// A new answer begins at its title.
watch('value', () => {
  const title = element.closest('#status');
  if (title.getBoundingClientRect().top < 0) title.scrollIntoView({block: 'start'});
});

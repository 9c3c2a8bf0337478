// The link to a file is clicked as soon as it is there.
watch('value', () => element.querySelector('a')?.click());

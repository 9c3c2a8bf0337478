// A picture that is chosen goes to the server with the next question, at most as large as it reads.
let moved = false;
const small = async (file, {most, side}) => {
  let picture = file;
  try {
    const image = await createImageBitmap(file);
    const scale = Math.min(1, side / Math.max(image.width, image.height));
    if (scale < 1 || file.size > most) {
      const canvas = document.createElement('canvas');
      canvas.width = Math.max(1, Math.round(scale * image.width));
      canvas.height = Math.max(1, Math.round(scale * image.height));
      const context = canvas.getContext('2d');
      context.imageSmoothingQuality = 'high';
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      picture = await new Promise(done => canvas.toBlob(done, 'image/jpeg', 0.9));
    }
  } catch {} // it is sent as it is: the server may read it, or says what is wrong
  return picture?.size <= most ? picture : new Blob();
};
element.addEventListener('change', async event => {
  const {files, dataset} = event.target;
  if (!files?.length) return;
  const reader = new FileReader();
  reader.onload = () => { moved = true; trigger('select', {picture: reader.result}); };
  reader.readAsDataURL(await small(files[0], dataset));
  event.target.value = ''; // so that the same file can be chosen again
});
element.addEventListener('click', event => {
  if (!event.target.closest('button')) return;
  moved = true;
  trigger('select', {});
});
watch('value', () => {
  if (moved) element.querySelector('button, input')?.focus({preventScroll: true});
  moved = false;
});

// Shared by all pages. All text is inserted as text nodes, never as HTML.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'onclick') element.addEventListener('click', value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

export function showError(error) {
  const place = byId('error');
  place.textContent = error ? error.message || String(error) : '';
  place.hidden = !error;
  if (error) place.scrollIntoView({block: 'nearest'});
}

// Sends a request; a refusal becomes an Error with the server's message.
export async function ask(path, body, signal) {
  let response;
  try {
    response = await fetch(path, body === undefined ? {signal} : {
      method: 'POST',
      headers: {'Content-Type': 'application/json'},
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('The server does not answer: has it been stopped?');
  }
  if (!response.ok) {
    let message = `The server answers ${response.status}.`;
    try {
      message = (await response.json()).error || message;
    } catch { /* Not JSON: the status must do. */ }
    throw new Error(message);
  }
  return response;
}

export const askJson = async (...args) => (await ask(...args)).json();

export const percent = (share, digits = 0) =>
  `${(100 * share).toFixed(digits)} %`;

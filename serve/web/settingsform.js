// The dialog of the settings. What is typed is taken over as it is typed; what makes no sense is said beside its field
// and not taken over.

import { toolsProblem } from "./chat.js";
import { h } from "./dom.js";
import { FIELDS, numberProblem } from "./settings.js";

/**
 * Make the dialog work.
 *
 * @param {HTMLDialogElement} dialog holds a form, and in it a place of the id "sampling" for the numbers of FIELDS
 * @param {{values: () => Record<string, string | boolean>, onChange: (name: string, value: string | boolean) => void}}
 *     caller `values` has what the controls show, by their names; `onChange` gets only what makes sense
 * @returns {{open: (name?: string) => void, fill: () => void}} `open` may put the focus on a control; `fill` shows the
 *     values again
 */
export function openForm(dialog, { values, onChange }) {
  const form = dialog.querySelector("form");
  document.getElementById("sampling").append(...FIELDS.map(numberField));
  const fill = () => {
    for (const control of form.elements) fillControl(control, values());
  };
  form.addEventListener("input", ({ target }) => {
    const problem = problemOf(target.name, target.value);
    showProblem(target, problem);
    if (!problem) onChange(target.name, target.type === "checkbox" ? target.checked : target.value.trim());
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input")) event.preventDefault(); // would close the dialog
  });
  return {
    fill,
    open(name) {
      fill();
      if (!dialog.open) dialog.showModal();
      if (name) form.elements[name].focus();
    },
  };
}

function numberField({ name, label, hint, whole }) {
  return h("div", { class: "field" },
    h("label", { for: `set-${name}` }, label),
    h("input", {
      id: `set-${name}`, name, inputmode: whole ? "numeric" : "decimal", autocomplete: "off",
      placeholder: "server's", "aria-describedby": `hint-${name} wrong-${name}`,
    }),
    h("small", { id: `hint-${name}` }, hint),
    h("small", { id: `wrong-${name}`, class: "wrong", role: "alert" }));
}

function problemOf(name, text) {
  const field = FIELDS.find((one) => one.name === name);
  return field ? numberProblem(field, text) : name === "tools" ? toolsProblem(text) : "";
}

function fillControl(control, values) {
  if (!(control.name in values)) return;
  if (control.type === "checkbox") control.checked = Boolean(values[control.name]);
  else control.value = values[control.name];
  showProblem(control, "");
}

function showProblem(control, problem) {
  const place = document.getElementById(`wrong-${control.name}`);
  if (!place) return;
  control.setAttribute("aria-invalid", String(Boolean(problem)));
  place.textContent = problem;
}

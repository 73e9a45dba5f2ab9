//! Fills in the configuration templates below `configs/lab/bench`. A word that nobody fills in is an error, never an
//! empty place.

use std::path::Path;

use crate::lab::error::{LabError, Result};

/// The template with each `{{name}}` replaced by its value; or the first name without one.
///
/// # Errors
/// The name of the first word in double braces that is not among `values`.
pub fn fill<'a>(
    template: &'a str,
    values: &[(&str, &str)],
) -> std::result::Result<String, &'a str> {
    let mut filled = String::with_capacity(template.len() + 256);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((name, behind)) = after.split_once("}}") else {
            break;
        };
        let (_, value) = values
            .iter()
            .find(|(known, _)| *known == name)
            .ok_or(name)?;
        filled.push_str(before);
        filled.push_str(value);
        rest = behind;
    }
    filled.push_str(rest);
    Ok(filled)
}

/// Fills in the template at `from` and writes it to `to`.
///
/// # Errors
/// When either file cannot be used, or the template has a word without a value.
pub fn write(from: &Path, to: &Path, values: &[(&str, &str)]) -> Result<()> {
    let file = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| LabError::File { what, path, source }
    };
    let template = std::fs::read_to_string(from).map_err(file("read", from))?;
    let filled = fill(&template, values).map_err(|name| LabError::Template {
        path: from.to_owned(),
        name: name.to_owned(),
    })?;
    std::fs::write(to, filled).map_err(file("write", to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_gets_its_value() {
        let values = [("a", "1"), ("b", "two")];
        assert_eq!(
            fill("x {{a}} {{b}}{{a}} } }}", &values).unwrap(),
            "x 1 two1 } }}"
        );
        assert_eq!(fill("{{a}} {{c}}", &values).unwrap_err(), "c");
    }
}

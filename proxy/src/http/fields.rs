//! Header fields by name, wherever they are kept: one view for the slices of HTTP/1 and the maps of HTTP/2 and 3, so
//! that routes and forwarding have one implementation.
//!
//! Values are bytes as the client sent them; nothing is joined, decoded or copied here.

/// The header fields of one request.
pub(crate) trait Fields {
    /// Hands over each value of a field, in the order in which they came. Names compare without case.
    fn visit<'s>(&'s self, name: &str, to: &mut dyn FnMut(&'s [u8]));

    /// The value of a field that is there exactly once.
    fn single<'s>(&'s self, name: &str) -> Option<&'s [u8]> {
        let (mut first, mut count) = (None, 0_usize);
        self.visit(name, &mut |value| {
            first = first.or(Some(value));
            count += 1;
        });
        first.filter(|_| count == 1)
    }
}

impl Fields for &[httparse::Header<'_>] {
    fn visit<'s>(&'s self, name: &str, to: &mut dyn FnMut(&'s [u8])) {
        for field in self.iter() {
            if field.name.eq_ignore_ascii_case(name) {
                to(field.value);
            }
        }
    }
}

impl Fields for http::HeaderMap {
    fn visit<'s>(&'s self, name: &str, to: &mut dyn FnMut(&'s [u8])) {
        self.get_all(name)
            .iter()
            .for_each(|value| to(value.as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_in_a_list_and_in_a_map() {
        let field = |name, value: &'static str| httparse::Header {
            name,
            value: value.as_bytes(),
        };
        let list = [field("A", "1"), field("b", "2"), field("a", "3")];
        let list = &list[..];
        let mut map = http::HeaderMap::new();
        for field in list {
            let name = http::HeaderName::from_bytes(field.name.as_bytes()).unwrap();
            map.append(name, http::HeaderValue::from_bytes(field.value).unwrap());
        }
        for fields in [&list as &dyn Fields, &map] {
            let mut seen: Vec<&[u8]> = Vec::new();
            fields.visit("a", &mut |value| seen.push(value));
            assert_eq!(seen, [b"1", b"3"]);
            assert_eq!(fields.single("a"), None);
            assert_eq!(fields.single("B"), Some(&b"2"[..]));
            assert_eq!(fields.single("c"), None);
        }
    }
}

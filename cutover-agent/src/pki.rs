//! Makes the small private certificate authority by which two agents recognise each other.
//!
//! One authority per pair of sites; each site has one certificate whose only name is its role, `source` or `target`.
//! Nothing is ever overwritten: an existing key may be in use by a running agent.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use thiserror::Error;

/// The two names a certificate can carry; a peer is accepted only under the one expected of it.
pub const ROLES: [&str; 2] = ["source", "target"];

/// Why no certificates were made.
#[derive(Debug, Error)]
pub enum PkiError {
    /// A file of an earlier run is there.
    #[error(
        "{0} exists already: remove it or choose another folder; existing keys are never overwritten"
    )]
    Exists(PathBuf),
    /// The folder or a file in it could not be written.
    #[error("cannot write {path}: check that the folder exists and is writable")]
    Write {
        /// What was being written.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The cryptographic library refused; not expected with the parameters used here.
    #[error("cannot make the certificate for {name}")]
    Make {
        /// The certificate's name.
        name: String,
        /// The library's reason.
        source: rcgen::Error,
    },
}

/// Writes `ca.pem`, `ca.key` and, for each role, `ROLE.pem` and `ROLE.key` into `folder`, which is made when missing.
/// Keys have mode 0600.
///
/// # Errors
/// When any of the files exists (then none is written), or the folder is not writable.
pub fn create(folder: &Path) -> Result<Vec<PathBuf>, PkiError> {
    let names = std::iter::once("ca").chain(ROLES);
    let paths: Vec<PathBuf> = names
        .flat_map(|name| ["pem", "key"].map(|end| folder.join(format!("{name}.{end}"))))
        .collect();
    if let Some(existing) = paths.iter().find(|path| path.symlink_metadata().is_ok()) {
        return Err(PkiError::Exists(existing.clone()));
    }
    std::fs::create_dir_all(folder).map_err(|source| PkiError::Write {
        path: folder.to_owned(),
        source,
    })?;
    let authority = authority()?;
    write_pair(folder, "ca", &authority.pem(), authority.key())?;
    for role in ROLES {
        let (certificate, key) = leaf(role, &authority)?;
        write_pair(folder, role, &certificate, &key)?;
    }
    Ok(paths)
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>, PkiError> {
    let make = || {
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params
            .distinguished_name
            .push(DnType::CommonName, "Hopgate agents");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        CertifiedIssuer::self_signed(params, KeyPair::generate()?)
    };
    make().map_err(|source| PkiError::Make {
        name: "ca".into(),
        source,
    })
}

fn leaf(
    role: &str,
    authority: &CertifiedIssuer<'static, KeyPair>,
) -> Result<(String, KeyPair), PkiError> {
    let make = || {
        let mut params = CertificateParams::new(vec![role.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, role);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Either agent may open the connection (the hop back), so each certificate serves both ends.
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, authority)?;
        Ok((certificate.pem(), key))
    };
    make().map_err(|source| PkiError::Make {
        name: role.into(),
        source,
    })
}

fn write_pair(folder: &Path, name: &str, certificate: &str, key: &KeyPair) -> Result<(), PkiError> {
    write_new(&folder.join(format!("{name}.pem")), certificate, 0o644)?;
    write_new(
        &folder.join(format!("{name}.key")),
        &key.serialize_pem(),
        0o600,
    )
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let open = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path);
    open.and_then(|mut file| {
        file.write_all(text.as_bytes().trim_ascii_end())
            .and_then(|()| file.write_all(b"\n"))
    })
    .map_err(|source| match source.kind() {
        std::io::ErrorKind::AlreadyExists => PkiError::Exists(path.to_owned()),
        _ => PkiError::Write {
            path: path.to_owned(),
            source,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn six_files_are_made_and_the_keys_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let made = create(&folder.path().join("tls")).unwrap();
        assert_eq!(made.len(), 6);
        for path in made {
            let mode = path.metadata().unwrap().permissions().mode() & 0o777;
            let private = path.extension().unwrap() == "key";
            assert_eq!(
                mode & 0o077 == 0,
                private,
                "{} has mode {mode:o}",
                path.display()
            );
        }
    }

    #[test]
    fn an_existing_file_is_never_overwritten_and_nothing_else_is_written() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("target.key"), "in use").unwrap();
        let refused = create(folder.path()).unwrap_err().to_string();
        assert!(refused.contains("target.key exists already"), "{refused}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

//! A certificate authority that lives as long as its test.
use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls_pki_types::CertificateDer;

pub struct Authority {
    folder: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A function's certificate, on disk as a function reads it.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub path: PathBuf,
    pub key: PathBuf,
    pub der: CertificateDer<'static>,
}

impl Authority {
    pub fn new(folder: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Pointsman test authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("making a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("signing the authority");
        fs::write(folder.join("authority.pem"), issuer.pem()).expect("writing the authority's certificate");
        Self { folder: folder.to_path_buf(), issuer }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.join("authority.pem")
    }

    pub fn der(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub fn issue(&self, function: &str, domains: &[&str]) -> Certificate {
        let names: Vec<String> = domains.iter().map(|domain| format!("{function}.{domain}")).collect();
        let mut params = CertificateParams::new(names).expect("names");
        // Python since 3.13 wants it, and the usage of the authority's key (RFC 5280, sections 4.2.1.1 and 4.2.1.3).
        params.use_authority_key_identifier_extension = true;
        params.distinguished_name.push(DnType::CommonName, function);
        let key = KeyPair::generate().expect("making a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signing a certificate");
        let paths = ["pem", "key"].map(|kind| self.folder.join(format!("{function}.{kind}")));
        fs::write(&paths[0], certificate.pem()).expect("writing a certificate");
        fs::write(&paths[1], key.serialize_pem()).expect("writing a key");
        let [path, key] = paths;
        Certificate { path, key, der: certificate.der().clone() }
    }
}

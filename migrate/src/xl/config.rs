//! A domain's configuration as libxl's JSON text.
//!
//! libxl's `libxl_domain_config` has another layout in every release, its JSON does not: fields
//! are added, and those that have their default value are left out. So what rxl changes or reads
//! is changed and read here, in the text. Source: `libxl_types.idl`, `libxl_domain_config`.

use serde_json::{Map, Number, Value};

use crate::frame::DomId;

/// A text that is not a domain's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not JSON, or not an object.
    #[error("the domain's configuration is not valid JSON")]
    Json(#[from] serde_json::Error),
    /// It has no `c_info` object, which every domain has.
    #[error("the domain's configuration has no c_info")]
    NoCreateInfo,
    /// It has a number that would not come out of here as it came in. libxl's are 64-bit integers.
    #[error("the domain's configuration holds {0}, which is not a 64-bit integer")]
    Number(Number),
}

/// A configuration, of which only a few fields are looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainConfig(Map<String, Value>);

impl DomainConfig {
    /// Takes it from libxl's JSON (a NUL at the end, as in xl's stream, does not matter).
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse(json: &str) -> Result<DomainConfig, ConfigError> {
        let fields: Map<String, Value> = serde_json::from_str(json.trim_end_matches('\0'))?;
        if let Some(number) = fields.values().find_map(inexact) {
            return Err(ConfigError::Number(number.clone()));
        }
        match fields.get("c_info") {
            Some(Value::Object(_)) => Ok(DomainConfig(fields)),
            _ => Err(ConfigError::NoCreateInfo),
        }
    }

    /// The domain's name (`c_info.name`).
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0.get("c_info")?.get("name")?.as_str()
    }

    /// Whether both are of one guest: the same UUID, or the same name where one has no UUID.
    #[must_use]
    pub fn is_of_same_guest(&self, other: &DomainConfig) -> bool {
        match (self.uuid(), other.uuid()) {
            (Some(own), Some(others)) => own.eq_ignore_ascii_case(others),
            _ => self.name() == other.name(),
        }
    }

    /// The guest's UUID (`c_info.uuid`).
    #[must_use]
    pub fn uuid(&self) -> Option<&str> {
        self.0.get("c_info")?.get("uuid")?.as_str()
    }

    /// Gives it another name.
    pub fn set_name(&mut self, name: &str) {
        self.set_create_info("name", Value::from(name));
    }

    /// Which number it is to get on the host that builds it; `None`: that host's choice.
    pub fn set_domid(&mut self, domid: Option<DomId>) {
        self.set_create_info("domid", Value::from(domid.map_or(0, |d| d.0)));
    }

    /// A field at the top, as text: the `on_poweroff` family. `None` where it is absent or no text.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    /// Whether it is an HVM guest (not PVH).
    #[must_use]
    pub fn is_hvm(&self) -> bool {
        self.0.get("c_info").and_then(|c| c.get("type")).is_some_and(|kind| kind == "hvm")
    }

    /// PCI devices that it has passed through (`pcidevs`).
    #[must_use]
    pub fn pci_devices(&self) -> usize {
        self.0.get("pcidevs").and_then(Value::as_array).map_or(0, Vec::len)
    }

    /// Nodes of its virtual NUMA topology (`b_info.vnuma_nodes`).
    #[must_use]
    pub fn vnuma_nodes(&self) -> usize {
        let nodes = self.0.get("b_info").and_then(|info| info.get("vnuma_nodes"));
        nodes.and_then(Value::as_array).map_or(0, Vec::len)
    }

    /// libxl's JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        Value::Object(self.0.clone()).to_string()
    }

    fn set_create_info(&mut self, field: &str, value: Value) {
        if let Some(Value::Object(info)) = self.0.get_mut("c_info") {
            info.insert(field.to_owned(), value);
        }
    }
}

/// A number in `value` that is no 64-bit integer. serde_json limits how deep values are nested.
fn inexact(value: &Value) -> Option<&Number> {
    match value {
        Value::Number(number) if number.is_f64() => Some(number),
        Value::Array(values) => values.iter().find_map(inexact),
        Value::Object(fields) => fields.values().find_map(inexact),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"c_info":{"type":"pv","name":"web","domid":7,"uuid":
        "8b1ff0b8-0000-4a5a-8a09-2d6bb3b35c9b","run_hotplug_scripts":"True"},
        "b_info":{"max_memkb":18446744073709551615,"sched_params":{"weight":256}},
        "on_reboot":"restart"}"#;

    fn value(json: &str) -> Value {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn renaming_changes_the_name_and_nothing_else() {
        let mut config = DomainConfig::parse(CONFIG).unwrap();
        assert_eq!(config.name(), Some("web"));
        config.set_name("web--\"incoming\"");
        let mut expected = value(CONFIG);
        expected["c_info"]["name"] = "web--\"incoming\"".into();
        assert_eq!(value(&config.to_json()), expected);
    }

    #[test]
    fn a_guest_is_known_by_its_uuid_and_without_one_by_its_name() {
        let config = |name: &str, uuid: &str| {
            let uuid = if uuid.is_empty() { String::new() } else { format!(r#","uuid":"{uuid}""#) };
            DomainConfig::parse(&format!(r#"{{"c_info":{{"name":"{name}"{uuid}}}}}"#)).unwrap()
        };
        let web = config("web", "8b1f-A");
        assert!(web.is_of_same_guest(&config("renamed", "8b1f-a")));
        assert!(!web.is_of_same_guest(&config("web", "77")));
        assert!(web.is_of_same_guest(&config("web", "")));
        assert!(!config("web", "").is_of_same_guest(&config("db", "")));
    }

    #[test]
    fn a_domid_is_set_and_0_means_none() {
        let mut config = DomainConfig::parse(CONFIG).unwrap();
        config.set_domid(Some(DomId(12)));
        assert_eq!(value(&config.to_json())["c_info"]["domid"], 12);
        config.set_domid(None);
        assert_eq!(value(&config.to_json())["c_info"]["domid"], 0);
    }

    #[test]
    fn the_nul_that_xl_sends_with_it_is_ignored() {
        let with_nul = format!("{CONFIG}\0");
        assert_eq!(DomainConfig::parse(&with_nul).unwrap(), DomainConfig::parse(CONFIG).unwrap());
    }

    #[test]
    fn a_number_of_64_bits_stays_exact() {
        let config = DomainConfig::parse(CONFIG).unwrap();
        assert_eq!(value(&config.to_json())["b_info"]["max_memkb"], u64::MAX);
    }

    #[test]
    fn what_is_not_a_configuration_is_refused() {
        for text in ["", "[]", "{", "null", "{\"c_info\":7}", "{}"] {
            assert!(DomainConfig::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_number_that_would_be_changed_is_refused() {
        for number in ["18446744073709551616", "-9223372036854775809", "1.5", "1e3"] {
            let text = format!("{{\"c_info\":{{\"a\":[{{\"b\":{number}}}]}}}}");
            let error = DomainConfig::parse(&text).unwrap_err();
            assert!(matches!(error, ConfigError::Number(_)), "{number}: {error}");
        }
    }
}

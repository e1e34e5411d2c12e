// The types that a dashboard with panels of time series on Prometheus must fit, from Grafana's own.
// The test puts the dashboard in place of the last line.

import type { Dashboard, Panel, RowPanel, VariableModel } from "grafana/raw/dashboard/x/types.gen";
import type { FieldConfig, Options } from "grafana/raw/composable/timeseries/panelcfg/x/types.gen";
import type { DataQuery } from "@grafana/schema";

// A type as JSON has it: the values of enums are plain texts.
type Json<T> = T extends string
  ? `${T}`
  : T extends readonly (infer Item)[]
    ? Json<Item>[]
    : T extends object
      ? { [Name in keyof T]: Json<T[Name]> }
      : T;

// Of a data source's own, which are not in Grafana's schema.
interface Query extends DataQuery {
  expr: string;
  legendFormat: string;
  range: boolean;
}
interface Variable extends VariableModel {
  definition?: string;
}

type Defaults = NonNullable<Panel["fieldConfig"]>["defaults"];
type Series = Omit<Panel, "type" | "options" | "targets" | "fieldConfig"> & {
  type: "timeseries";
  options: Options;
  targets: Query[];
  fieldConfig: { defaults: Omit<Defaults, "custom"> & { custom: FieldConfig }; overrides: [] };
};
type Whole = Omit<Dashboard, "panels" | "templating"> & {
  panels: (Series | RowPanel)[];
  templating: { list: Variable[] };
};

export const dashboard: Json<Whole> = DASHBOARD;

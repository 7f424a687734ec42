// The alert rules for Azure Monitor, made by `llmkit monitor rules`; changes here are overwritten.
//   az deployment group create --template-file azure/monitoring/alerts.bicep --parameters prometheusId=... mails=...
// prometheusId is an Azure Monitor workspace that scrapes the server; logsId the workspace behind Application Insights.
// Either may be left empty. Rules that Application Insights has no data for: model_drift, low_accuracy, server_down, log_losing_rows, monitor_behind, disk_nearly_full, gpu_hot.
targetScope = 'resourceGroup'

param location string = resourceGroup().location

@description('An Azure Monitor workspace with managed Prometheus; empty makes no rule group.')
param prometheusId string = ''

@description('The Log Analytics workspace that Application Insights writes to; empty makes no scheduled queries.')
param logsId string = ''

@description('Who gets mails.')
param mails array = []

@description('Addresses that get alerts as JSON (common alert schema).')
@secure()
param webhooks object = {}

resource people 'Microsoft.Insights/actionGroups@2023-01-01' = {
  name: 'llmkit'
  location: 'global'
  properties: {
    groupShortName: 'llmkit'
    enabled: true
    emailReceivers: [for (mail, i) in mails: {
      name: 'mail${i}'
      emailAddress: mail
      useCommonAlertSchema: true
    }]
    webhookReceivers: [for hook in items(webhooks): {
      name: hook.key
      serviceUri: hook.value
      useCommonAlertSchema: true
    }]
  }
}

resource group 'Microsoft.AlertsManagement/prometheusRuleGroups@2023-03-01' = if (!empty(prometheusId)) {
  name: 'llmkit'
  location: location
  properties: {
    enabled: true
    interval: 'PT1M'
    scopes: [
      prometheusId
    ]
    rules: [
      {
        alert: 'high_latency'
        enabled: true
        expression: 'histogram_quantile(0.95, sum by (model_name, le) (rate(vllm:e2e_request_latency_seconds_bucket[5m]))) > 0.1'
        for: 'PT5M'
        severity: 2
        labels: {
          severity: 'warning'
          signal: 'P95'
        }
        annotations: {
          summary: 'high_latency: P95 > 100ms, now {{ printf "%.4g" $value }} s'
          description: 'One request in twenty takes longer. Look at queue time, batch and the phases of a request.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'high_error_rate'
        enabled: true
        expression: 'sum(rate(llmkit:http_responses_total{status=~"5.."}[5m])) / sum(rate(llmkit:http_responses_total[5m])) > 0.01'
        for: 'PT5M'
        severity: 0
        labels: {
          severity: 'critical'
          signal: 'error_rate'
        }
        annotations: {
          summary: 'high_error_rate: error_rate > 1%, now {{ $value | humanizePercentage }}'
          description: 'The server itself fails requests. Look at engine restarts and at the log of errors.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'model_drift'
        enabled: true
        expression: 'max by (revision, kind) (llmkit:drift_score) > 0.1'
        for: 'PT5M'
        severity: 2
        labels: {
          severity: 'warning'
          signal: 'drift_score'
        }
        annotations: {
          summary: 'model_drift: drift_score > 0.1, now {{ printf "%.4g" $value }}'
          description: 'Prompts or replies are no longer those of the reference profile. Ask for the drift report.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'low_accuracy'
        enabled: true
        expression: 'min by (revision) (llmkit:accuracy) < 0.95'
        for: 'PT5M'
        severity: 0
        labels: {
          severity: 'critical'
          signal: 'accuracy'
        }
        annotations: {
          summary: 'low_accuracy: accuracy < 0.95, now {{ printf "%.4g" $value }}'
          description: 'Labelled replies are wrong more often. Compare revisions, and roll back if one is to blame.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'server_down'
        enabled: true
        expression: '(sum(up{job="llmkit"}) or vector(0)) < 1.0'
        for: 'PT1M'
        severity: 0
        labels: {
          severity: 'critical'
          signal: 'servers_up'
        }
        annotations: {
          summary: 'server_down: servers_up < 1, now {{ printf "%.4g" $value }}'
          description: 'No server answers on /metrics. All other rules are silent while this one holds.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'log_losing_rows'
        enabled: true
        expression: 'sum(increase(llmkit:request_log_lost_total[5m])) > 0.0'
        for: 'PT0M'
        severity: 0
        labels: {
          severity: 'critical'
          signal: 'request_log_lost'
        }
        annotations: {
          summary: 'log_losing_rows: request_log_lost > 0, now {{ printf "%.4g" $value }}'
          description: 'Requests are served but not written down; look at the disk under the request log.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'monitor_behind'
        enabled: true
        expression: 'max(llmkit:monitor_behind_seconds) > 60.0'
        for: 'PT5M'
        severity: 2
        labels: {
          severity: 'warning'
          signal: 'monitor_behind'
        }
        annotations: {
          summary: 'monitor_behind: monitor_behind > 60s, now {{ printf "%.4g" $value }} s'
          description: 'Drift, cost and accuracy are late; a rollout should wait.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'disk_nearly_full'
        enabled: true
        expression: 'min by (instance) (llmkit:system_disk_free_bytes) < 5000000000.0'
        for: 'PT10M'
        severity: 2
        labels: {
          severity: 'warning'
          signal: 'disk_free'
        }
        annotations: {
          summary: 'disk_nearly_full: disk_free < 5GB, now {{ $value | humanize }}B'
          description: 'The request log is next to lose rows. Free space, or lower its bound.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
      {
        alert: 'gpu_hot'
        enabled: true
        expression: 'max by (instance, gpu) (llmkit:gpu_temperature_celsius) > 85.0'
        for: 'PT5M'
        severity: 2
        labels: {
          severity: 'warning'
          signal: 'gpu_temperature'
        }
        annotations: {
          summary: 'gpu_hot: gpu_temperature > 85C, now {{ printf "%.4g" $value }} °C'
          description: 'The GPU will slow itself down; look at fans, airflow and power limit.'
        }
        actions: [
          {
            actionGroupId: people.id
          }
        ]
        resolveConfiguration: {
          autoResolved: true
          timeToResolve: 'PT10M'
        }
      }
    ]
  }
}

resource query_high_latency 'Microsoft.Insights/scheduledQueryRules@2022-06-15' = if (!empty(logsId)) {
  name: 'llmkit-high_latency'
  location: location
  kind: 'LogAlert'
  properties: {
    displayName: 'llmkit high_latency'
    description: 'P95 > 100ms. One request in twenty takes longer. Look at queue time, batch and the phases of a request.'
    severity: 2
    enabled: true
    scopes: [
      logsId
    ]
    evaluationFrequency: 'PT5M'
    windowSize: 'PT5M'
    autoMitigate: true
    criteria: {
      allOf: [
        {
          query: 'AppRequests | extend model = tostring(Properties["gen_ai.response.model"]) | where isnotempty(model) | summarize value = percentile(DurationMs, 95) / 1000 by model'
          timeAggregation: 'Average'
          metricMeasureColumn: 'value'
          dimensions: [
            {
              name: 'model'
              operator: 'Include'
              values: [
                '*'
              ]
            }
          ]
          operator: 'GreaterThan'
          threshold: json('0.1')
          failingPeriods: {
            numberOfEvaluationPeriods: 2
            minFailingPeriodsToAlert: 2
          }
        }
      ]
    }
    actions: {
      actionGroups: [
        people.id
      ]
    }
  }
}

resource query_high_error_rate 'Microsoft.Insights/scheduledQueryRules@2022-06-15' = if (!empty(logsId)) {
  name: 'llmkit-high_error_rate'
  location: location
  kind: 'LogAlert'
  properties: {
    displayName: 'llmkit high_error_rate'
    description: 'error_rate > 1%. The server itself fails requests. Look at engine restarts and at the log of errors.'
    severity: 0
    enabled: true
    scopes: [
      logsId
    ]
    evaluationFrequency: 'PT5M'
    windowSize: 'PT5M'
    autoMitigate: true
    criteria: {
      allOf: [
        {
          query: 'AppRequests | extend model = tostring(Properties["gen_ai.response.model"]) | where isnotempty(model) | summarize value = todouble(countif(toint(ResultCode) >= 500)) / count()'
          timeAggregation: 'Average'
          metricMeasureColumn: 'value'
          dimensions: []
          operator: 'GreaterThan'
          threshold: json('0.01')
          failingPeriods: {
            numberOfEvaluationPeriods: 2
            minFailingPeriodsToAlert: 2
          }
        }
      ]
    }
    actions: {
      actionGroups: [
        people.id
      ]
    }
  }
}
